"""Two runs do not write to one folder."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys

import pytest
from lightning.pytorch import Callback

from app.checkpoints.run_lock import LOCK_FILE, hold, release
from app.errors import CheckpointError
from callbacks import LastCheckpoint
from tests.support.runs import cli, make_data, make_module, make_trainer
from tests.support.stream_runs import write_config, write_sources

HOLD = "import sys; from app.checkpoints.run_lock import hold; hold(__import__('pathlib').Path(sys.argv[1]));"


@pytest.fixture
def other(tmp_path):
    """A process that holds the folder of checkpoints of a run, and that folder."""
    folder = tmp_path / "run" / "checkpoints"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{HOLD} print(flush=True); sys.stdin.read()", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    yield holder, folder
    holder.kill()
    holder.communicate()
    release()


def test_a_second_fit_is_refused_naming_the_first_until_that_is_dead(tmp_path, other, monkeypatch, capsys):
    holder, folder = other
    config = write_config(tmp_path, write_sources(tmp_path), max_steps=1, checkpoint_every=1)
    assert cli(monkeypatch, "fit", "--config", str(config)) == 2
    named = f"error: {folder}: another fit writes there, process {holder.pid} on {socket.gethostname()}: wait for it"
    assert named in capsys.readouterr().err
    holder.kill()
    holder.wait()
    assert cli(monkeypatch, "fit", "--config", str(config)) == 0
    assert [file.name for file in folder.iterdir()] == ["last.ckpt"]


def test_a_script_holds_the_folder_of_its_checkpoints_while_it_trains(tmp_path, other):
    holder, folder = other
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, *_):
            seen.append((folder / LOCK_FILE).read_text())

    def fit():
        callbacks = [LastCheckpoint(dirpath=str(folder)), Look()]
        make_trainer(tmp_path, max_steps=1, callbacks=callbacks).fit(make_module(), datamodule=make_data(tmp_path))

    with pytest.raises(CheckpointError, match=f"another fit writes there, process {holder.pid}"):
        fit()
    holder.kill()
    holder.wait()
    fit()
    assert seen == [f"process {os.getpid()} on {socket.gethostname()}\n"]
    assert [file.name for file in folder.iterdir()] == ["last.ckpt"]


def test_who_holds_a_folder_may_ask_again_and_so_may_a_rank_that_it_starts(tmp_path):
    hold(tmp_path)
    hold(tmp_path)
    subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], check=True)
    with pytest.raises(subprocess.CalledProcessError):  # but none that some other process starts
        subprocess.run(["sh", "-c", f'{sys.executable} -c "$0" "$1"; exit $?', HOLD, str(tmp_path)], check=True)
    release()
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_where_nothing_can_be_locked_a_run_is_warned(tmp_path, monkeypatch, caplog, number):
    def no_locks(descriptor, operation):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    hold(tmp_path)
    release()
    assert re.search(r"cannot be locked \(no locks\): see to it that no other run writes there", caplog.text)


def test_a_lock_of_another_machine_says_what_to_do(tmp_path, monkeypatch):
    def taken(descriptor, operation):
        raise OSError(errno.EAGAIN, "taken")

    monkeypatch.setattr(fcntl, "lockf", taken)
    (tmp_path / LOCK_FILE).write_text("process 7 on node3\n")
    with pytest.raises(CheckpointError, match=rf"process 7 on node3: .* remove {tmp_path}/{LOCK_FILE}"):
        hold(tmp_path)
