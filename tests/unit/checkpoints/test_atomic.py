"""At every moment a whole checkpoint stands, under its name or where `find_checkpoint` finds it."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from app.checkpoints import atomic
from app.checkpoints.atomic import (
    clear_leftovers,
    find_checkpoint,
    partial_path,
    previous_checkpoint,
    publish,
    remove,
    restore_interrupted,
)
from app.checkpoints.checkpoint_io import AtomicCheckpointIO


def write(path, text, *, directory):
    if directory:
        path.mkdir()
        (path / "shard").write_text(text)
    else:
        path.write_text(text)


def read(path):
    return (path / "shard" if path.is_dir() else path).read_text()


def replace(path, *, directory, keep_previous, kill_at):
    """Put "new" in the place of "old"; killed before the `kill_at`-th change to the disk."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree"), (os, "fsync")):
        setattr(owner, name, counted(getattr(owner, name)))
    publish(path, keep_previous=keep_previous)
    os._exit(0)


@pytest.mark.parametrize("keep_previous", [False, True])
@pytest.mark.parametrize("directory", [False, True])
def test_killed_at_any_moment_of_the_replacement_the_old_or_the_new_one_stands(tmp_path, directory, keep_previous):
    seen, kill_at = [], 0
    while "all" not in seen:
        kill_at += 1
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        path = folder / "last.ckpt"
        write(path, "old", directory=directory)
        write(partial_path(path), "new", directory=directory)
        settings = {"directory": directory, "keep_previous": keep_previous, "kill_at": kill_at}
        child = mp.get_context("fork").Process(target=replace, args=(path,), kwargs=settings)
        child.start()
        child.join(timeout=120)
        found = read(find_checkpoint(path))
        assert found in ("old", "new")
        seen += [found, "all"] if child.exitcode == 0 else [found]
        clear_leftovers(folder)
        assert read(path) == found
        assert {entry.name for entry in folder.iterdir()} <= {"last.ckpt", "before_last.ckpt"}
    assert read(path) == "new"
    assert previous_checkpoint(path).exists() == keep_previous
    assert seen[0] == "old"


def test_names_are_given_back_by_any_number_of_processes_and_a_run_elsewhere_is_left_alone(tmp_path):
    write(tmp_path / ".last.ckpt.previous", "old", directory=True)
    write(tmp_path / ".best.ckpt.partial", "half", directory=True)
    restore_interrupted(tmp_path)
    restore_interrupted(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".best.ckpt.partial", "last.ckpt"]
    clear_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_half_removed_it_is_no_checkpoint(tmp_path, monkeypatch):
    write(tmp_path / "last.ckpt", "old", directory=True)

    def interrupted(path):
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_delete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "last.ckpt")
    assert not find_checkpoint(tmp_path / "last.ckpt").exists()


def content(weight):
    return {"pytorch-lightning_version": "2.6.0", "global_step": 1, "state_dict": {"w": weight}}


def die_within_the_file(path):
    whole = torch.save

    def half(checkpoint, file):
        whole(checkpoint, file)
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    AtomicCheckpointIO().save_checkpoint(content(torch.zeros(1000)), path)


def test_killed_within_a_single_file_the_one_before_stands(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(torch.ones(1000)), path)
    child = mp.get_context("fork").Process(target=die_within_the_file, args=(path,))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == -signal.SIGKILL
    assert partial_path(path).stat().st_size > 1000
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["w"], torch.ones(1000))
    AtomicCheckpointIO().save_checkpoint(content(torch.zeros(1)), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
