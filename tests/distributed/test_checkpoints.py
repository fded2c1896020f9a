"""Directories that two ranks write together: whole or absent, resumed from by any strategy, damage noticed."""

import errno
import os
import re
import shutil
import signal
import sys
import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from app.checkpoints import integrity as checkpoint_integrity
from app.checkpoints import writer as checkpoint_writer
from app.checkpoints.checkpoint_io import AtomicCheckpointIO
from app.checkpoints.integrity import saved_step
from app.checkpoints.sharded import ShardedCheckpoints
from app.checkpoints.weights import open_trained_weights
from app.cli import consolidate
from app.errors import CheckpointError
from app.model_files.open import load_pretrained
from callbacks import LastCheckpoint
from tests.support.checkpoints import write_manifest
from tests.support.memory import process_status
from tests.support.processes import run_ranks
from tests.support.runs import cli, curricula, make_data, make_module, make_trainer

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),  # resumed runs save elsewhere
]

HALF, STEPS = 3, 6


class Losses(Callback):
    """The global loss of every step."""

    def __init__(self):
        self.by_step = {}

    def on_train_batch_end(self, trainer, *_):
        if "train/loss" in trainer.callback_metrics:
            self.by_step[trainer.global_step] = trainer.callback_metrics["train/loss"].item()


def fit(
    root,
    strategy,
    *,
    name,
    resume=None,
    until=STEPS,
    extra=(),
    keep_previous=False,
    fall_back=False,
    every=HALF,
    **model,
):
    """A run on one or two ranks with the same global batch; its losses by step."""
    ranks = 1 if strategy == "auto" else 2
    losses = Losses()
    saver = LastCheckpoint(dirpath=str(root / name), every_n_train_steps=every, keep_previous=keep_previous)
    trainer = make_trainer(
        root,
        max_steps=until,
        callbacks=[*curricula(max_dropout_rate=0.0), losses, *extra, saver],
        devices=ranks,
        strategy=strategy,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2 // ranks,
        plugins=[AtomicCheckpointIO(use_previous=fall_back)],
    )
    module = make_module(lr_schedule="constant", warmup_steps=4, **model)
    trainer.fit(module, datamodule=make_data(root, num_lanes=2), ckpt_path=resume and str(root / resume / "last.ckpt"))
    return losses.by_step


def mesh(**settings):
    return ShardedCheckpoints(data_parallel_size=2, tensor_parallel_size=1, **settings)


def second_half(losses):
    return {step: loss for step, loss in losses.items() if step > HALF}


# -- resumed by the same strategy, and by others -----------------------------------------------------------------------


def resume_everywhere(root):
    runs = {}
    for kind, strategy in (("mesh", mesh), ("ddp", lambda: "ddp")):
        runs[kind] = fit(root, strategy(), name=kind, keep_previous=True)
        if os.environ["RANK"] == "0":  # the other rank reads it when both have begun the next run
            (half := root / f"{kind}_half").mkdir()
            before = root / kind / "before_last.ckpt"
            (shutil.copytree if before.is_dir() else shutil.copy)(before, half / "last.ckpt")
    for kind, strategy in (("mesh", mesh), ("ddp", lambda: "ddp")):
        for saved in ("mesh", "ddp"):
            runs[f"{kind} from {saved}"] = fit(root, strategy(), name="resumed", resume=f"{saved}_half")
    runs["background"] = fit(
        root, mesh(asynchronous=True), name="background", extra=[SaveInBackground(root)], every=1000
    )
    runs["mesh from background"] = fit(root, mesh(), name="resumed", resume="slow", every=1000)
    fit(root, mesh(), name="poisoned", until=1, extra=[PoisonStateOfRank1()])
    with pytest.raises(CheckpointError) as refused:
        fit(root, mesh(), name="resumed", resume="poisoned")
    runs["refused"] = str(refused.value)
    return runs


class PoisonStateOfRank1(Callback):
    """NaN in one optimizer state, in the part that rank 1 holds."""

    def on_train_batch_end(self, trainer, *_):
        state = [*trainer.optimizers[0].state.values()][2]["exp_avg"].to_local()
        if trainer.global_rank == 1:
            state.view(-1)[-1] = float("nan")


class SaveInBackground(Callback):
    """Saves at half of the run with a writer that is not done before the run is two steps further."""

    def __init__(self, root):
        self.path, self.further = root / "slow" / "last.ckpt", threading.Event()
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == HALF:
            original, further = checkpoint_writer.CheckpointWriter.write_data, self.further

            def write_data(writer, plan, planner):
                if "slow" in str(writer.path):
                    assert further.wait(timeout=60)
                return original(writer, plan, planner)

            checkpoint_writer.CheckpointWriter.write_data = write_data
            trainer.save_checkpoint(self.path)
        elif trainer.global_step == HALF + 2:
            assert not self.path.exists()
            self.further.set()


@pytest.fixture(scope="module")
def runs(root):
    """Losses of every run, by rank."""
    return run_ranks(resume_everywhere, root)


def test_a_run_goes_on_from_what_either_strategy_saved_as_if_nothing_had_been(runs, root):
    for of_rank in runs:
        assert len(of_rank["mesh"]) == STEPS
        assert len(set(of_rank["mesh"].values())) == STEPS  # so equality says something
        for kind, other in (("mesh", "ddp"), ("ddp", "mesh")):
            assert of_rank[f"{kind} from {kind}"] == second_half(of_rank[kind])
            assert of_rank[f"{kind} from {other}"] == pytest.approx(second_half(of_rank[kind]), abs=2e-6)
    assert (root / "mesh_half" / "last.ckpt").is_dir()
    assert (root / "ddp_half" / "last.ckpt").is_file()
    assert open_trained_weights(root / "mesh_half" / "last.ckpt").metadata["global_step"] == HALF


def test_training_goes_on_while_a_checkpoint_is_written_and_the_checkpoint_does_not_notice(runs, root):
    for of_rank in runs:
        assert of_rank["background"] == of_rank["mesh"]
        assert of_rank["mesh from background"] == second_half(of_rank["mesh"])
    assert [path.name for path in (root / "slow").iterdir()] == ["last.ckpt"]


def test_nothing_is_left_beside_checkpoints(runs, root):
    assert sorted(path.name for path in (root / "mesh").iterdir()) == ["before_last.ckpt", "last.ckpt"]
    assert [path.name for path in (root / "mesh_half").iterdir()] == ["last.ckpt"]


# -- consolidated ------------------------------------------------------------------------------------------------------


def test_consolidated_it_is_the_single_file_of_the_same_step(runs, root, tmp_path, monkeypatch, capsys):
    output = tmp_path / "whole.ckpt"
    monkeypatch.setattr(consolidate, "_SMALL", 1 << 10)
    arguments = ["--ckpt_path", str(root / "mesh_half" / "last.ckpt"), "--output", str(output)]
    assert cli(monkeypatch, "consolidate", *arguments) == 0
    assert f"{output}: step {HALF}, " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["whole.ckpt"]
    output.write_text("of another run")
    assert cli(monkeypatch, "consolidate", *arguments, "--overwrite", "true") == 0
    ours, ddps = (torch.load(path, weights_only=True) for path in (output, root / "ddp_half" / "last.ckpt"))
    assert ours.keys() == ddps.keys()
    assert same(ours, ddps, skip={"callbacks"}), "differ"
    assert not same(ours, torch.load(root / "ddp" / "last.ckpt", weights_only=True), skip={"callbacks"})  # it can tell


def same(one, other, *, skip=frozenset()):
    if isinstance(one, torch.Tensor):
        return torch.allclose(one.double(), other.double(), atol=1e-5)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one.keys() - skip)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt_path", "FILE", "--output", "out.ckpt"], "allowed a checkpoint directory; a single file is whole"),
        (["--ckpt_path", "absent", "--output", "out.ckpt"], "ckpt_path: got 'absent', allowed a checkpoint directory"),
        (["--ckpt_path", "DIRECTORY", "--output", "out"], "output: got 'out', allowed the name of a file that ends in"),
        (
            ["--ckpt_path", "DAMAGED", "--output", "out.ckpt"],
            "damaged, the bytes of __1_0.distcp are not",
        ),
        (["--ckpt_path", "DIRECTORY", "--output", "precious.ckpt"], "output: got 'precious.ckpt', allowed a new file"),
        (["--ckpt_path", "COPIED", "--output", "out.ckpt"], "not all there (manifest.json is missing)"),
        (["--ckpt_path", "EMPTY", "--output", "out.ckpt"], "EMPTY: no weights are in its shards"),
        (["--ckpt_path", "POISONED", "--output", "out.ckpt"], "exp_avg holds NaN or infinity in float32"),
    ],
)
def test_what_cannot_be_consolidated_is_refused_and_nothing_is_written(
    arguments, message, runs, root, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    directory = root / "mesh_half" / "last.ckpt"
    places = {"FILE": root / "ddp_half" / "last.ckpt", "DIRECTORY": directory}
    places["POISONED"] = root / "poisoned" / "last.ckpt"
    if "DAMAGED" in arguments:
        places["DAMAGED"] = damaged_copy(directory, tmp_path, "__1_0.distcp")
    if "EMPTY" in arguments:
        dcp.save({"unrelated": torch.zeros(1)}, checkpoint_id=tmp_path / "EMPTY")
        shutil.copy(directory / "meta.pt", tmp_path / "EMPTY")
        write_manifest(tmp_path / "EMPTY")
    if "COPIED" in arguments:
        places["COPIED"] = damaged_copy(directory, tmp_path, "manifest.json")
        (places["COPIED"] / "manifest.json").unlink()
    (tmp_path / "precious.ckpt").write_text("of another run")
    before = set(tmp_path.rglob("*"))
    assert cli(monkeypatch, "consolidate", *[str(places.get(each, each)) for each in arguments]) == 2
    assert message in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) == before
    assert (tmp_path / "precious.ckpt").read_text() == "of another run"


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells what memory is a process's own")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_consolidating_takes_the_memory_of_a_few_tensors(tmp_path, monkeypatch):
    tensors = {f"state_dict.{i}": torch.full((1 << 19,), float(i)) for i in range(50)}
    dcp.save(tensors, checkpoint_id=tmp_path / "directory")
    content = {"pytorch-lightning_version": "2.6.0", "global_step": 1, "optimizer_states": []}
    torch.save(content, tmp_path / "directory" / "meta.pt")
    write_manifest(tmp_path / "directory")
    del tensors
    seen, mapped = [], consolidate._mapped
    monkeypatch.setattr(
        consolidate, "_mapped", lambda *given: (mapped(*given), seen.append(1024 * process_status("RssAnon")))[0]
    )
    output = tmp_path / "whole.ckpt"
    assert cli(monkeypatch, "consolidate", "--ckpt_path", str(tmp_path / "directory"), "--output", str(output)) == 0
    assert max(seen) - seen[0] < 10 * 4 * (1 << 19) < len(seen) * 4 * (1 << 19)
    weights = torch.load(output, weights_only=True, mmap=True)["state_dict"]
    assert all(weights[str(i)].unique().tolist() == [i] for i in range(50))


# -- damaged -----------------------------------------------------------------------------------------------------------


def damaged_copy(directory, folder, name):
    copy = folder / "copy" / "last.ckpt"
    shutil.copytree(directory, copy)
    shutil.copytree(
        directory.with_name("before_last.ckpt"), copy.with_name("before_last.ckpt"), dirs_exist_ok=True
    ) if (directory.with_name("before_last.ckpt").exists()) else None
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt", "manifest.json"])
def test_one_flipped_bit_in_any_file_of_a_directory_is_noticed(name, runs, root, tmp_path):
    copy = damaged_copy(root / "mesh_half" / "last.ckpt", tmp_path, name)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        AtomicCheckpointIO().load_checkpoint(copy)
    assert "\n" not in str(caught.value)
    assert AtomicCheckpointIO().load_checkpoint(root / "mesh_half" / "last.ckpt")["global_step"] == HALF


def test_a_directory_that_is_not_copied_whole_is_refused_by_whoever_reads_it(runs, root, tmp_path):
    copy = tmp_path / "copy.ckpt"
    shutil.copytree(root / "mesh_half" / "last.ckpt", copy)
    (copy / "manifest.json").unlink()
    for read in (AtomicCheckpointIO().load_checkpoint, load_pretrained):
        with pytest.raises(CheckpointError, match=r"not all there \(manifest.json is missing\)"):
            read(str(copy))


def test_a_state_that_is_not_finite_in_one_shard_is_refused_by_all_ranks(runs):
    for of_rank in runs:
        assert re.search(
            r"poisoned/last.ckpt: optimizer_0\.state\.\S+exp_avg holds NaN or infinity", of_rank["refused"]
        )


def test_a_disk_that_fails_is_told_in_one_line(runs, root, monkeypatch):
    def fail(file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint_integrity, "checksum_of", fail)
    with pytest.raises(CheckpointError, match=r"last.ckpt: cannot be read \(\[Errno 5\] Input/output error\)"):
        AtomicCheckpointIO().load_checkpoint(root / "mesh_half" / "last.ckpt")


def start_from(root, path):
    with pytest.raises(CheckpointError) as caught:
        fit(root, mesh(), name="started", config=None, pretrained=str(path))
    return str(caught.value)


def test_ranks_that_start_from_damaged_weights_all_say_so(runs, root, tmp_path):
    copy = damaged_copy(root / "mesh_half" / "last.ckpt", tmp_path, "__1_0.distcp")
    for message in run_ranks(start_from, root, copy):
        assert "the bytes of __1_0.distcp are not those that were written" in message


def test_the_one_before_is_named_and_taken_if_that_is_allowed(runs, root, tmp_path, caplog):
    copy = damaged_copy(root / "mesh" / "last.ckpt", tmp_path, "__1_0.distcp")
    with pytest.raises(CheckpointError, match=r"before_last.ckpt \(--fall_back_to_previous true takes it\)"):
        AtomicCheckpointIO().load_checkpoint(copy)
    assert AtomicCheckpointIO(use_previous=True).load_checkpoint(copy)["global_step"] == HALF
    assert f"{STEPS - HALF} steps are lost, training goes on after step {HALF}" in caplog.text


def refuse_on_both_ranks(root, copy):
    with pytest.raises(CheckpointError) as caught:
        fit(root, mesh(), name="resumed", resume=copy)
    return str(caught.value), fit(root, mesh(), name=copy, resume=copy, fall_back=True, keep_previous=True)


def test_damage_that_one_rank_finds_is_told_by_both_and_both_fall_back(runs, root, tmp_path):
    copy = damaged_copy(root / "mesh" / "last.ckpt", tmp_path, "__1_0.distcp")
    for (message, losses), of_rank in zip(run_ranks(refuse_on_both_ranks, root, copy.parent), runs, strict=True):
        assert "the bytes of __1_0.distcp are not those that were written" in message
        assert losses == second_half(of_rank["mesh"])
    steps = [saved_step(copy.with_name(name)) for name in ("before_last.ckpt", "last.ckpt")]
    assert steps == [HALF, STEPS]
    assert AtomicCheckpointIO().load_checkpoint(copy.with_name("before_last.ckpt"))["global_step"] == HALF


def save_weights_only(root):
    saver = ModelCheckpoint(dirpath=root / "weights", filename="last", save_weights_only=True, every_n_train_steps=1)
    fit(root, mesh(), name="whole", until=1, extra=[saver])
    with pytest.raises(CheckpointError) as caught:
        fit(root, mesh(), name="resumed", resume="weights")
    trainer = make_trainer(
        root, max_steps=1, callbacks=[], devices=2, strategy=mesh(), limit_val_batches=1, logger=False
    )
    found = trainer.validate(
        make_module(),
        datamodule=make_data(root, num_lanes=2),
        ckpt_path=str(root / "weights" / "last.ckpt"),
        verbose=False,
    )
    return str(caught.value), found


def test_a_directory_of_weights_alone_is_validated_and_not_resumed(root):
    for message, [found] in run_ranks(save_weights_only, root):
        assert "last.ckpt: weights only" in message
        assert found["val/loss"] > 0


# -- killed, and full disks --------------------------------------------------------------------------------------------


def die_in_the_second_save(root):
    original = checkpoint_writer.CheckpointWriter.write_data

    def write_data(writer, plan, planner):
        written = original(writer, plan, planner)
        if writer._step > HALF:
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    checkpoint_writer.CheckpointWriter.write_data = write_data
    fit(root, mesh(), name="killed")


def go_on(root):
    return fit(root, mesh(), name="killed", resume="killed")


def test_ranks_killed_while_they_write_leave_the_checkpoint_before(runs, root):
    with pytest.raises(pytest.fail.Exception, match="crashed"):
        run_ranks(die_in_the_second_save, root)
    left = [".fit.lock", ".last.ckpt.partial", "last.ckpt"]
    assert sorted(path.name for path in (root / "killed").iterdir()) == left
    assert list((root / "killed" / ".last.ckpt.partial").glob("*.distcp"))  # it was in the middle
    for losses, of_rank in zip(run_ranks(go_on, root), runs, strict=True):
        assert losses == second_half(of_rank["mesh"])
    assert [path.name for path in (root / "killed").iterdir()] == ["last.ckpt"]


def fill_the_disk_of_rank_1(root, asynchronous):
    original = checkpoint_writer.CheckpointWriter.write_data

    def write_data(writer, plan, planner):
        if writer._step > HALF and os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(writer, plan, planner)

    checkpoint_writer.CheckpointWriter.write_data = write_data
    with pytest.raises(CheckpointError) as caught:
        fit(root, mesh(asynchronous=asynchronous), name=f"full{asynchronous}")
    return str(caught.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_of_one_rank_is_told_by_both_and_the_checkpoint_before_stands(asynchronous, root):
    for message in run_ranks(fill_the_disk_of_rank_1, root, asynchronous):
        assert "cannot write checkpoint" in message
        assert "rank 1: [Errno 28] No space left on device; earlier checkpoints are untouched" in message
    folder = root / f"full{asynchronous}"
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(folder / "last.ckpt")["global_step"] == HALF
