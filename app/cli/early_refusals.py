"""What config and shape of the model tell of a fit, said before it writes: Lightning's setup opens a logger first."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from app.errors import ConfigError
from app.model.config_check import check_runs
from app.training.batch import check_row_length
from app.training.module import LayerSkipModule
from callbacks import (
    EarlyExitCurriculum,
    ExitQualityMonitor,
    LayerDropoutCurriculum,
    ParseValidation,
    SelfSpeculativeValidation,
)
from callbacks.decoding_validation import check_decoding_host
from datamodules import TextCodeDataModule, TOPv2DataModule
from datamodules.loading.trainer_checks import check_end

_ASKED_TWICE = (LayerDropoutCurriculum, EarlyExitCurriculum, ExitQualityMonitor)  # the setup of others may not bear it


def refuse_early(trainer: Trainer, module: LayerSkipModule, data: LightningDataModule) -> None:
    """Ask all who need neither weights nor rows, in the order in which Lightning will ask them again.

    Args:
        trainer: Not yet running.
        module: Without its model; left as it is, but that it knows the trainer.
        data: Not asked for its tokenizer, which it may have to train.

    Raises:
        ConfigError: As later it would be.
    """
    module.trainer = trainer
    if isinstance(data, TextCodeDataModule):
        check_end(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SelfSpeculativeValidation | ParseValidation):
            check_decoding_host(module, callback.exit_layers)
        elif type(callback) in _ASKED_TWICE:
            callback.setup(trainer, module, "fit")
    if isinstance(data, TextCodeDataModule | TOPv2DataModule):
        check_row_length(data.seq_len, module.config)
    if module.pretrained is None:
        _check_memory(check_runs(module.config), trainer)
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on all ranks: it is broadcast
    if trainer.is_global_zero:
        _check_folder(folder)
    module.optimizer_over(nn.ParameterList([torch.zeros(1, 1), torch.zeros(1)]))  # one for each of its groups


def _check_memory(num_weights: int, trainer: Trainer) -> None:
    """A model that is not built in parts is built in this machine's memory first, in float32."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * num_weights > there and not isinstance(trainer.strategy, ModelParallelStrategy):
        got, allowed = f"{num_weights:,} weights", f"what {there / 1e9:.0f} GB of memory hold, at 4 bytes each"
        raise ConfigError("config", got=got, allowed=allowed, fix="a MeshStrategy holds no model whole")


def _check_folder(folder: Path) -> None:
    """Make the run's folder and a file in it, and remove what is new: whether that works, only the attempt tells."""
    new = [above for above in (folder, *folder.parents) if not above.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        allowed = "a folder that can be written to"
        raise ConfigError("trainer.logger", got=str(folder), allowed=allowed, fix=error.strerror or "") from error
    finally:
        for above in new:
            with suppress(OSError):  # another process may use it by now
                above.rmdir()
