"""The step's sums, on losses made by hand and a trainer of a few attributes."""

from types import SimpleNamespace

import pytest
import torch

from app.layerskip.early_exit_loss import EarlyExitLoss
from app.training.divergence import DivergenceGuard
from app.training.step_sums import StepSums
from app.training.token_mean import TokenMeanStep


def loss(*exit_sums, tokens=5):
    return EarlyExitLoss(torch.tensor(sum(exit_sums)), torch.tensor(exit_sums), torch.tensor(tokens))


def test_a_loss_that_is_not_finite_is_told_of_its_own_micro_batch_whichever_exit_it_is():
    nan = float("nan")
    for exit_sums in ([nan, 2.0, 3.0], [1.0, nan, 3.0], [1.0, 2.0, nan]):
        sums = StepSums()
        for micro_batch in ([1.0, 2.0, 3.0], exit_sums, [1.0, 2.0, 3.0]):
            sums.add(loss(*micro_batch))
        assert sums.not_finite_at() == [(0, 1)]


@pytest.mark.parametrize("data_ranks", [1, 2, 4])
def test_ranks_that_share_rows_count_their_label_tokens_once(data_ranks):
    """Of four ranks; each has the same sums, so those of all ranks are four times one's."""
    logged = {}
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda sums, reduce_op: 4 * sums),
        distributed_sampler_kwargs={"rank": 0, "num_replicas": data_ranks},
        world_size=4, accumulate_grad_batches=2, precision_plugin=None, global_step=0, _results=None,
    )  # fmt: skip
    module = SimpleNamespace(trainer=trainer, log=lambda name, value, **_: logged.update({name: float(value)}))
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    step = TokenMeanStep(DivergenceGuard("stop", 1))
    for _ in range(2):
        step.add(loss(5.0, 10.0), {1: 0.25, 2: 0.75})
    step.finish(module, torch.optim.SGD([weight], lr=1.0))
    assert logged["train/label_tokens_per_step"] == 10 * data_ranks
    assert (logged["train/exit_loss/exit_01"], logged["train/loss"]) == (1.0, 1.75)
    assert weight.grad.item() == pytest.approx(4096 * 2 * 4 / 40)
