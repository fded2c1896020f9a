"""The bar counts micro-batches of the whole run, whatever a step takes and wherever the run was resumed."""

import logging
import sys

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from app.cli.main import AboveBars
from callbacks import LastCheckpoint, LayerSkipProgressBar
from tests.support.runs import make_data, make_module, make_trainer


class Watched(LayerSkipProgressBar):
    """Notes what it shows: where it starts, then after every micro-batch; and the total that is read in between."""

    def __init__(self):
        super().__init__(refresh_rate=1)
        self.start, self.shown, self.totals = None, [], set()

    def on_train_batch_start(self, trainer, *rest):
        if self.start is None:
            self.start = (self.train_progress_bar.n, self.train_progress_bar.initial)
        self.totals.add(self.total_train_batches)

    def on_train_batch_end(self, trainer, *rest):
        super().on_train_batch_end(trainer, *rest)
        self.shown.append((self.train_progress_bar.n, self.train_progress_bar.total))
        self.totals.add(self.total_train_batches)


def fit(root, *, accumulate, max_steps, resume=None, **settings):
    bar = Watched()
    savers = [
        LastCheckpoint(every_n_train_steps=100, dirpath=str(root)),  # behind the epoch
        ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False),
    ]
    settings = {"accumulate_grad_batches": accumulate, "enable_progress_bar": True} | settings
    trainer = make_trainer(root, max_steps=max_steps, callbacks=[bar, *savers], **settings)
    trainer.fit(make_module(), make_data(root), ckpt_path=resume and root / resume)
    assert trainer.global_step == max_steps
    return bar


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("resume", ["last.ckpt", "step=2.ckpt"])
def test_the_bar_ends_at_its_total_and_goes_on_from_where_a_resumed_run_was(tmp_path, capsys, accumulate, resume):
    fresh = fit(tmp_path, accumulate=accumulate, max_steps=3)
    whole = 3 * accumulate
    assert fresh.start == (0, 0)
    assert fresh.shown == [(taken, whole) for taken in range(1, whole + 1)]
    assert fresh.totals == {whole}
    done = (3 if resume == "last.ckpt" else 2) * accumulate
    resumed = fit(tmp_path, accumulate=accumulate, max_steps=5, resume=resume)
    whole = 5 * accumulate
    assert resumed.start == (done, done)  # tqdm's rate is of what it did itself
    assert resumed.shown == [(taken, whole) for taken in range(done + 1, whole + 1)]
    assert resumed.totals == {whole}
    shown = capsys.readouterr()
    assert f"{whole}/{whole}" in shown.err
    assert "it/s" not in shown.out


class Failing(Watched):
    """Ends the run at the second micro-batch, which its bar then shows."""

    def on_train_batch_end(self, trainer, *rest):
        super().on_train_batch_end(trainer, *rest)
        if len(self.shown) == 2:
            raise RuntimeError("the run's end")


def test_an_error_ends_the_line_of_the_bar(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_steps=3, callbacks=[bar := Failing()], enable_progress_bar=True)
    with pytest.raises(RuntimeError, match="the run's end"):
        trainer.fit(make_module(), make_data(tmp_path))
    assert bar.train_progress_bar.disable  # closed: it draws nothing more
    assert capsys.readouterr().err.endswith("\n")


class Speaking(LayerSkipProgressBar):
    def on_train_batch_end(self, *given):
        super().on_train_batch_end(*given)
        handler = AboveBars(sys.stderr)
        handler.emit(logging.LogRecord("app", logging.INFO, "", 0, "a word", None, None))


def test_a_message_stands_on_a_line_of_its_own_above_the_bar(tmp_path, capsys):
    speaking = Speaking(refresh_rate=1)
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[speaking], enable_progress_bar=True)
    trainer.fit(make_module(), make_data(tmp_path))
    before, after = capsys.readouterr().err.split("a word\n")
    assert before.endswith(" \r")  # the bar is gone
    assert after.startswith("\rEpoch 0: ")


def test_every_epoch_has_a_total_of_its_own_and_the_last_is_as_long_as_steps_remain(tmp_path):
    """Five micro-batches an epoch are three steps, the third of one alone."""
    bar = fit(tmp_path, accumulate=2, max_steps=5, limit_train_batches=5)
    assert bar.shown == [(taken, 5) for taken in range(1, 6)] + [(taken, 4) for taken in range(1, 5)]


def test_bars_of_validation_are_on_stderr_too(tmp_path, capsys):
    fit(tmp_path, accumulate=1, max_steps=1, limit_val_batches=1, num_sanity_val_steps=1, val_check_interval=1)
    shown = capsys.readouterr()
    assert "Sanity Checking" in shown.err
    assert "Validation" in shown.err
    assert "Sanity" not in shown.out
