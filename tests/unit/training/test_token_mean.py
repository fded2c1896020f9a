"""The step's sums, on losses made by hand and a trainer of a few attributes."""

from types import SimpleNamespace

import pytest
import torch

from app.layerskip.early_exit_loss import EarlyExitLoss
from app.training.divergence import DivergenceGuard
from app.training.token_mean import TokenMeanStep


def finish(step, weight, *, num_replicas=1):
    """Let a step be finished on one of four ranks that all have its sums; returns what was logged."""
    logged = {}
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda sums, reduce_op: 4 * sums),
        distributed_sampler_kwargs={"rank": 0, "num_replicas": num_replicas},
        world_size=4, accumulate_grad_batches=2, precision_plugin=None, global_step=0, _results=None,
        is_global_zero=True,
    )  # fmt: skip
    module = SimpleNamespace(trainer=trainer, log=lambda name, value, **_: logged.update({name: float(value)}))
    step.finish(module, torch.optim.SGD([weight], lr=1.0))
    return logged


def loss(*exit_sums, tokens=5):
    return EarlyExitLoss(torch.tensor(sum(exit_sums)), torch.tensor(exit_sums), torch.tensor(tokens))


def weight_with_gradient():
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    return weight


def test_a_loss_that_is_not_finite_is_told_of_its_own_micro_batch_whichever_exit_it_is(caplog):
    nan = float("nan")
    for exit_sums in ([nan, 2.0, 3.0], [1.0, nan, 3.0], [1.0, 2.0, nan]):
        step, weight = TokenMeanStep(DivergenceGuard("skip", 1)), weight_with_gradient()
        for micro_batch in ([1.0, 2.0, 3.0], exit_sums, [1.0, 2.0, 3.0]):
            step.add(loss(*micro_batch), {1: 0.25, 2: 0.25, 3: 0.5})
        finish(step, weight)
        assert "on, rank 0 micro-batch 1; skipped" in caplog.messages[-1]
        assert weight.grad is None


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_ranks_that_share_rows_count_their_label_tokens_once(num_replicas):
    """Of four ranks; each has the same sums, so those of all ranks are four times one's."""
    step, weight = TokenMeanStep(DivergenceGuard("stop", 1)), weight_with_gradient()
    for _ in range(2):
        step.add(loss(5.0, 10.0), {1: 0.25, 2: 0.75})
    logged = finish(step, weight, num_replicas=num_replicas)
    assert logged["train/label_tokens_per_step"] == 10 * num_replicas
    assert (logged["train/exit_loss/exit_01"], logged["train/loss"]) == (1.0, 1.75)
    assert weight.grad.item() == pytest.approx(4096 * 2 * 4 / 40)
