"""Ranks that would run different blocks: silently wrong under FSDP2, and caught by DropoutAgreementCheck beforehand."""

import os

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

import app.training.curriculum_host as module_under_test
from app.errors import ConfigError, DisagreementError
from app.layerskip.layer_dropout import KeptSamples, draw_kept_samples
from callbacks import DropoutAgreementCheck
from datamodules import TextCodeDataModule
from tests.support.distributed import whole_weights
from tests.support.processes import run_ranks
from tests.support.runs import NUM_LAYERS, UnequalRows, curricula, make_data, make_module, make_trainer

BATCH = 4


class CountBlocks(Callback):
    """How many blocks this rank ran."""

    def __init__(self):
        self.count = 0

    def on_train_start(self, trainer, pl_module):
        for block in pl_module.model.model.layers:
            block.mlp.register_forward_pre_hook(self.add)

    def add(self, *_):
        self.count += 1


def draw(skip):
    """In place of the module's draw: at step 1 the rank keeps no sample in block `skip[rank]`."""

    def drawn(rates, *, batch_size, step, **key):
        kept = [torch.arange(batch_size)] * len(rates)
        if step == 1:
            kept[skip[dist.get_rank()]] = torch.arange(0)
        return KeptSamples(tuple(kept), tuple(map(len, kept)))

    return drawn


def train(root, strategy, *, check=(), max_steps=2, accumulate=1):
    count = CountBlocks()
    trainer = make_trainer(
        root,
        max_steps=max_steps,
        callbacks=[*curricula(curriculum="none"), *check, count],
        devices=2,
        strategy=strategy,
        accumulate_grad_batches=accumulate,
    )
    module = make_module(optimizer=lambda params: torch.optim.SGD(params, lr=0.3))
    message = ""
    try:
        trainer.fit(module, datamodule=make_data(root, batch_size=BATCH, num_lanes=2))
    except DisagreementError as error:
        message = str(error)
    return {"weights": whole_weights(module), "message": message, "steps": trainer.global_step, "blocks": count.count}


def fsdp2():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def ddp():
    return DDPStrategy(process_group_backend="gloo")


def train_skipping(root, skip, strategy, check):
    module_under_test.draw_kept_samples = draw(skip)  # in this process alone: it is forked
    return train(root, strategy(), check=[DropoutAgreementCheck()] if check else [])


def furthest(ours, theirs):
    return max(abs(ours["weights"][name] - theirs["weights"][name]).max() for name in ours["weights"])


@pytest.mark.distributed
def test_as_many_but_different_skipped_blocks_are_silently_wrong_under_fsdp2_and_the_check_catches_it(tmp_path):
    make_data(tmp_path).prepare_data()
    right = {skip: run_ranks(train_skipping, tmp_path, skip, ddp, False)[0] for skip in ((1, 1), (1, 2))}
    same = run_ranks(train_skipping, tmp_path, (1, 1), fsdp2, True)[0]
    assert furthest(same, right[1, 1]) < 1e-6

    wrong = run_ranks(train_skipping, tmp_path, (1, 2), fsdp2, False)[0]
    assert (wrong["steps"], wrong["message"]) == (2, "")  # no error, no hang
    assert furthest(wrong, right[1, 2]) > 1e-3

    first, second = run_ranks(train_skipping, tmp_path, (1, 2), fsdp2, True)
    assert first["message"] == second["message"]
    assert "at step 1, micro-batch 0: block 1: samples kept: 0 on rank 0, 4 on rank 1;" in first["message"]
    assert (first["steps"], first["blocks"], second["blocks"]) == (1, NUM_LAYERS, NUM_LAYERS)  # step 1 ran no block


def disagree(root, change):
    """A difference on rank 1 alone; what both ranks say, and whether they share rows."""
    rank = int(os.environ["RANK"])
    settings = {"callbacks": curricula(max_dropout_rate=0.5), "strategy": ddp()}
    original, kind = draw_kept_samples, UnequalRows if change == "rows" else TextCodeDataModule
    if change == "rates" and rank:
        settings["callbacks"] = curricula(max_dropout_rate=0.0)
    if change == "exits" and rank:
        settings["callbacks"] = curricula(curriculum="none")
    if change == "seed" and rank:
        module_under_test.draw_kept_samples = lambda *args, seed, **key: original(*args, seed=seed + 1, **key)
    if change == "same rows":  # as tensor-parallel ranks have, which then drop other samples
        settings["strategy"] = SameRows(process_group_backend="gloo")
        module_under_test.draw_kept_samples = lambda *args, micro_batch, **key: original(
            *args, micro_batch=micro_batch * 2 + rank, **key
        )
    trainer = make_trainer(
        root, max_steps=4, devices=2, **settings | {"callbacks": [*settings["callbacks"], DropoutAgreementCheck()]}
    )
    try:
        trainer.fit(make_module(), datamodule=make_data(root, num_lanes=2, kind=kind))
    except DisagreementError as error:
        return str(error)
    return ""


class SameRows(DDPStrategy):
    """Both ranks train on the same rows."""

    @property
    def distributed_sampler_kwargs(self):
        return {"num_replicas": 1, "rank": 0}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("none", None),
        ("rows", None),
        ("rates", "block 1: rate: "),
        ("exits", "exits and weights: ((2, "),
        ("seed", ": samples kept: "),
        ("same rows", ": which samples are kept of the same rows: "),
    ],
)
def test_every_difference_between_ranks_is_named_on_all_of_them(tmp_path, change, expected):
    make_data(tmp_path).prepare_data()
    first, second = run_ranks(disagree, tmp_path, change)
    assert first == second
    assert expected in first if expected else first == ""


def train_checking(root, every_n_steps):
    calls = []
    check = DropoutAgreementCheck(every_n_steps=every_n_steps)
    gather = dist.all_gather

    def count(everyones, own):
        calls.append(own.numel() * own.element_size())
        return gather(everyones, own)

    dist.all_gather = count  # in this process alone: it is forked
    train(root, ddp(), check=[check], max_steps=5, accumulate=2)
    return calls


@pytest.mark.distributed
def test_a_check_is_one_collective_of_24_bytes_a_micro_batch_every_so_many_steps(tmp_path):
    make_data(tmp_path).prepare_data()
    assert run_ranks(train_checking, tmp_path, 2)[0] == [24] * 6  # steps 0, 2, 4, of two micro-batches


def test_one_process_has_nobody_to_agree_with(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[*curricula(), DropoutAgreementCheck()])
    trainer.fit(make_module(), datamodule=make_data(tmp_path))
    assert trainer.global_step == 2


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="every_n_steps"):
        DropoutAgreementCheck(every_n_steps=0)
