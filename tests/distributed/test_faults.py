"""What goes wrong on one rank alone: all ranks come to the same end, and the message says whose fault it was."""

import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from app.cli.messages import user_message
from app.errors import DataError, DivergenceError
from datamodules import Source
from tests.support.distributed import whole_weights
from tests.support.processes import run_ranks
from tests.support.runs import curricula, make_data, make_module, make_trainer, write_corpus

pytestmark = pytest.mark.distributed

STRATEGIES = {
    "ddp": lambda **settings: DDPStrategy(process_group_backend="gloo", **settings),
    "fsdp2": lambda **settings: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **settings),
}
STEPS = 4


class On(Callback):
    """Does something on rank 1 before one step."""

    def __init__(self, step, act, *, hook):
        self.step, self.act, self.hook = step, act, hook

    def _now(self, trainer, pl_module, hook):
        if trainer.global_rank == 1 and (trainer.global_step, hook) == (self.step, self.hook):
            self.act(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._now(trainer, pl_module, "batch")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._now(trainer, pl_module, "gradient")


def nan_loss(module):
    """The next call of the head, and that alone, gives NaN."""
    weighted_losses = module._network.weighted_losses

    def poisoned(*args):
        module._network.weighted_losses = weighted_losses
        total, losses = weighted_losses(*args)
        return total * torch.nan, losses * torch.nan

    module._network.weighted_losses = poisoned


def damaged_gradient(module):
    grad = module.model.lm_head.weight.grad
    getattr(grad, "to_local", lambda: grad)()[0] = torch.inf


def slow(module):
    time.sleep(2)


def train(root, strategy, *extra, data=None, max_steps=STEPS, settings=None, limit_val_batches=0, **strategy_settings):
    trainer = make_trainer(
        root,
        max_steps=max_steps,
        callbacks=[*curricula(curriculum="none"), *extra],
        devices=2,
        strategy=STRATEGIES[strategy](**strategy_settings),
        limit_val_batches=limit_val_batches,
        check_val_every_n_epoch=None,
        val_check_interval=2,
    )
    module = make_module(**(settings or {}))
    try:
        trainer.fit(module, datamodule=make_data(root, num_lanes=2, **(data or {})))
    except (DataError, DivergenceError, RuntimeError) as error:
        return {"message": user_message(error) or repr(error), "steps": trainer.global_step}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"weights": whole_weights(module), "metrics": metrics, "steps": trainer.global_step}


def same_weights(ours, theirs):
    return all((ours["weights"][name] == theirs["weights"][name]).all() for name in ours["weights"])


# -- not finite on one rank --------------------------------------------------------------------------------------------


def with_nan(root, strategy, on_divergence):
    return train(root, strategy, On(2, nan_loss, hook="batch"), settings={"on_divergence": on_divergence})


def test_a_nan_on_one_rank_stops_both_naming_it_or_is_skipped_by_both(tmp_path):
    make_data(tmp_path).prepare_data()
    first, second = run_ranks(with_nan, tmp_path, "fsdp2", "stop")
    assert first == second
    assert "at step 2 with exits [4] on, rank 1 micro-batch 0;" in first["message"]
    first, second = run_ranks(with_nan, tmp_path, "fsdp2", "skip")
    assert first["steps"] == second["steps"] == STEPS
    assert same_weights(first, second)
    assert first["metrics"]["train/skipped_steps"] == second["metrics"]["train/skipped_steps"] == 1


def with_damage(root, strategy):
    return train(root, strategy, On(2, damaged_gradient, hook="gradient"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_that_is_damaged_on_one_rank_stops_both_naming_it(tmp_path, strategy):
    """Under DDP nothing is exchanged any more then: the other replica's gradient is fine."""
    make_data(tmp_path).prepare_data()
    first, second = run_ranks(with_damage, tmp_path, strategy)
    assert first["message"].split(" at step 2 ")[1] == second["message"].split(" at step 2 ")[1]
    assert "in model.model.embed_tokens.weight on rank 1;" in first["message"]


# -- an optimizer that knows no shards ---------------------------------------------------------------------------------


def with_fused_sgd(root):
    return train(root, "fsdp2", settings={"optimizer": lambda params: torch.optim.SGD(params, lr=0.1, fused=True)})


def test_an_optimizer_that_cannot_take_shards_is_told_from_a_bug(tmp_path):
    make_data(tmp_path).prepare_data()
    for of_rank in run_ranks(with_fused_sgd, tmp_path):
        assert of_rank["message"].startswith("aten._fused_sgd_.default does not work on sharded weights")
        assert "--model.optimizer.init_args.fused false" in of_rank["message"]


# -- a slow rank -------------------------------------------------------------------------------------------------------


def with_slow_rank(root, strategy, seconds, delay):
    extra = [On(2, slow, hook="batch")] if delay else []
    return train(root, strategy, *extra, timeout=timedelta(seconds=seconds))


def test_a_slow_rank_is_waited_for_and_changes_nothing(tmp_path):
    make_data(tmp_path).prepare_data()
    delayed, _ = run_ranks(with_slow_rank, tmp_path, "ddp", 60, True)
    prompt, _ = run_ranks(with_slow_rank, tmp_path, "ddp", 60, False)
    assert same_weights(delayed, prompt)


def test_a_rank_that_is_waited_for_too_long_ends_the_run_with_what_to_do(tmp_path):
    make_data(tmp_path).prepare_data()
    first, _ = run_ranks(with_slow_rank, tmp_path, "ddp", 1, True)
    assert "rank 0 waited for another rank" in first["message"]
    assert "timeout" in first["message"]


# -- nothing to do for one rank ---------------------------------------------------------------------------------------


def with_few_documents(root, strategy, documents, data, limit_val_batches=1.0):
    corpus = root / f"corpus_of_{documents}"
    sources = {"code": Source(kind="files", path=str(corpus))}
    return train(root, strategy, data={"sources": sources} | data, limit_val_batches=limit_val_batches)


def test_fewer_held_out_rows_than_ranks_are_refused_on_both_ranks(tmp_path):
    write_corpus(tmp_path / "corpus_of_12")
    data = {"validation_rows": 1}
    for said in run_ranks(with_few_documents, tmp_path, "ddp", 12, data):
        assert "held-out rows (1) are fewer than devices (2); raise validation_rows" in said["message"]


def test_a_corpus_of_fewer_documents_than_ranks_feeds_both(tmp_path):
    """Its one document is in one rank's part of the stream alone."""
    write_corpus(tmp_path / "corpus_of_1", files=1)
    data = {"validation_share": 0.01}
    first, second = run_ranks(with_few_documents, tmp_path, "ddp", 1, data, 0)
    assert first["steps"] == second["steps"] == STEPS, (first, second)
    assert same_weights(first, second)
