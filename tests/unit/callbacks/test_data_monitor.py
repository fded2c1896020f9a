from types import SimpleNamespace

import pytest
from lightning.pytorch import LightningDataModule

from callbacks import DataMonitor
from tests.support.runs import make_data, make_module, make_trainer


def test_shares_epochs_and_skipped_records_are_logged(tmp_path):
    monitor = DataMonitor()
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[monitor], log_every_n_steps=2, accumulate_grad_batches=2)
    data = make_data(tmp_path, max_bad_share=0.5)
    (tmp_path / "corpus" / "empty.py").write_text("")
    trainer.fit(make_module(), datamodule=data)
    metrics = {
        name: value.item()
        for name, value in trainer.callback_metrics.items()
        if name.startswith(("source/", "throughput/"))
    }
    delivered = data.source_statistics()["code"]
    assert metrics == pytest.approx(
        {
            "throughput/padding_share": 0.0,
            "source/token_share/code": 1.0,
            "source/epochs/code": delivered.epochs,
            "source/skipped_records/code": delivered.skipped,
        }
    )
    assert delivered.rows == 4 * 2 * 4
    assert delivered.skipped > 0
    assert delivered.epochs > 0


def test_a_datamodule_without_sources_is_left_alone_with_a_warning(caplog):
    trainer = SimpleNamespace(datamodule=LightningDataModule(), log_every_n_steps=1, accumulate_grad_batches=1)
    DataMonitor().setup(trainer, make_module(), "fit")
    DataMonitor().on_train_batch_end(trainer, None, None, None, 0)
    assert "DataMonitor has no effect: LightningDataModule does not mix sources" in caplog.text


def test_nothing_is_logged_where_logging_is_off(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[DataMonitor()], log_every_n_steps=0)
    trainer.fit(make_module(), datamodule=make_data(tmp_path))
    assert not [name for name in trainer.callback_metrics if name.startswith("source/")]
