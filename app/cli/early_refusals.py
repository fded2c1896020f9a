"""What config and shape of the model tell of a fit, said before it writes: Lightning's setup opens a logger first."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn

from app.model.sharded_loading import build_without_memory
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
from datamodules.placement import check_end

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
        build_without_memory(module.config, dtype=torch.float32)
    module.optimizer_over(nn.ParameterList([torch.zeros(1, 1), torch.zeros(1)]))  # one for each of its groups
