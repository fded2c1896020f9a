"""Through the real command, on one rank: a run that is killed in the second epoch of its corpus goes on there."""

import torch

from datamodules.stream import LaneState
from tests.support.runs import write_corpus
from tests.support.stream_runs import finish, kill, kill_behind_first_checkpoint, losses, start, write_config

STEPS, SAVED_AT = 160, 100


def test_a_run_killed_in_the_second_epoch_resumes_to_the_losses_of_one_that_nobody_killed(tmp_path):
    sources = {"code": {"kind": "files", "path": str(write_corpus(tmp_path / "code"))}}
    config = write_config(tmp_path, sources, max_steps=STEPS, checkpoint_every=SAVED_AT)
    killed = start(config, "killed")
    kill_behind_first_checkpoint(killed, tmp_path / "killed")
    checkpoint = torch.load(tmp_path / "killed" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == SAVED_AT
    lane = LaneState.of(checkpoint["TextCodeDataModule"]["lanes"]["0"])
    assert lane.places[0].block == 1  # blocks end with an epoch: this is the second
    assert lane.places[0].drawn > 1
    whole = start(config, "whole")
    try:
        finish(start(config, "killed", "--ckpt_path", "last"))
        finish(whole)
    finally:
        kill(whole)
    expected, resumed = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert len(expected) == STEPS
    assert len(set(expected.values())) > STEPS / 2  # so equality says something
    assert resumed.items() <= expected.items()
    assert set(range(SAVED_AT, STEPS)) <= resumed.keys()
