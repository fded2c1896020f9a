"""A mixed corpus on two ranks through the real command: kill -9, `--ckpt_path last`, and nobody could tell."""

import pytest

from tests.support.stream_runs import (
    finish,
    kill,
    kill_behind_first_checkpoint,
    losses,
    start,
    write_config,
    write_sources,
)

STEPS = 60
TWO_RANKS = ("--trainer.strategy", "ddp", "--trainer.devices", "2")


@pytest.mark.distributed
def test_two_killed_ranks_resume_to_the_losses_of_two_that_nobody_killed(tmp_path):
    config = write_config(tmp_path, write_sources(tmp_path), max_steps=STEPS, checkpoint_every=5)
    killed = start(config, "killed", *TWO_RANKS)
    kill_behind_first_checkpoint(killed, tmp_path / "killed")
    whole = start(config, "whole", *TWO_RANKS)
    try:
        finish(start(config, "killed", *TWO_RANKS, "--ckpt_path", "last"))
        finish(whole)
    finally:
        kill(whole)
    expected, resumed = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert len(expected) == STEPS
    assert len(set(expected.values())) > STEPS / 2  # so equality says something
    # TensorBoard writes now and then: what the killed process saw last may be missing; what it wrote must agree.
    assert resumed.items() <= expected.items()
    assert set(range(STEPS - 15, STEPS)) <= resumed.keys()
