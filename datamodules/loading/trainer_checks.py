"""Trainer settings that datamodules refuse, since they divide and order the batches themselves.

Tested by tests/unit/datamodules/test_text_code.py, tests/unit/datamodules/test_topv2.py.
"""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from app.errors import ConfigError
from datamodules.loading.rank_share import RankShare


def check_trainer(trainer: Trainer) -> None:
    """Refuse a trainer that would divide the batches once more, or repeat them.

    Raises:
        ConfigError: Naming the setting.
    """
    divides = trainer._accelerator_connector.use_distributed_sampler  # it has no public name
    if divides and RankShare.of(trainer).num_replicas > 1:
        raise ConfigError(
            "trainer.use_distributed_sampler",
            got=True,
            allowed="False on more than one device",
            fix="batches are divided among the ranks already; Lightning would divide them again",
        )
    overfit: float = trainer.overfit_batches  # type: ignore[attr-defined]  # Lightning sets it by setattr
    if overfit:
        raise ConfigError("trainer.overfit_batches", got=overfit, allowed="0", fix="train on less data instead")


def check_end(trainer: Trainer) -> None:
    """Refuse a trainer that would wait for the end of a stream that has none.

    Raises:
        ConfigError: Naming the setting.
    """
    if isinstance(trainer.limit_train_batches, int):  # that many batches are an epoch
        return
    if trainer.max_steps < 1 and not any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError("trainer.max_steps", got=trainer.max_steps, allowed=">= 1: the stream of batches has no end")
    interval = getattr(trainer, "val_check_interval", None)  # it is missing where validation goes by the clock
    if isinstance(interval, float) and trainer.limit_val_batches:  # a share of an epoch
        allowed = "a number of batches: the stream of batches has no epochs"
        raise ConfigError("trainer.val_check_interval", got=interval, allowed=allowed)
