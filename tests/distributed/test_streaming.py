"""A mixed corpus on two ranks through the real command: kill -9, `--ckpt_path last`, and nobody could tell."""

import os
import signal

import pytest

from app.training.module import LayerSkipModule
from tests.support.processes import run_ranks
from tests.support.runs import cli
from tests.support.stream_runs import finish, losses, start, write_config, write_sources

STEPS, SAVED_AT = 24, 5
LAST = ("--ckpt_path", "last")
TWO_RANKS = ("--trainer.strategy", "ddp", "--trainer.devices", "2")


def fit(config, name, options=(), kill_at=STEPS):
    step = LayerSkipModule.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LayerSkipModule, "training_step", training_step)
        arguments = ["--config", str(config), "--trainer.logger.init_args.name", name, *TWO_RANKS, *options]
        return cli(patched, "fit", *arguments)


@pytest.mark.slow  # test_kill.py kills one process by default, test_ddp.py resumes two ranks
@pytest.mark.distributed
@pytest.mark.parametrize("launched", [False, True])
def test_two_killed_ranks_resume_to_the_losses_of_two_that_nobody_killed(tmp_path, launched):
    config = write_config(tmp_path, write_sources(tmp_path), max_steps=STEPS, checkpoint_every=SAVED_AT)
    with pytest.raises(pytest.fail.Exception, match="crashed"):
        run_ranks(fit, config, "killed", (), SAVED_AT + 2)
    assert run_ranks(fit, config, "whole") == [0, 0]
    if launched:
        finish(start(config, "killed", *TWO_RANKS, *LAST))  # which starts the second rank itself
    else:
        assert run_ranks(fit, config, "killed", LAST) == [0, 0]
    expected, resumed = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert len(expected) == STEPS
    assert len(set(expected.values())) > STEPS / 2  # so equality says something
    # TensorBoard writes now and then: what the killed process saw last may be missing; what it wrote must agree.
    assert resumed.items() <= expected.items()
    assert set(range(SAVED_AT, STEPS)) <= resumed.keys()
