"""The results of `validate` and `test`, in place of Lightning's table, and warnings of what would spoil them."""

import logging

import torch
from lightning.pytorch import Trainer

from app.metric_names import TEST_LOSS, VAL_LOSS
from app.model.cpu.precision import emulated
from app.protocols import Reportable
from app.tables import Table
from app.training.module import LayerSkipModule

_log = logging.getLogger(__name__)

_IN_OTHER_TABLES = ("val/exit_", "test/exit_", "decode/", "parse/", "/task/")


def measured_table(trainer: Trainer) -> Table | None:
    """Return the logged metrics, without those that callbacks report in tables of their own; None if there are none."""
    told = any(isinstance(callback, Reportable) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    rows: list[tuple[str, ...]] = [
        (name, f"{float(value):.4g}")
        for name, value in sorted(trainer.callback_metrics.items())
        if not (told and any(part in name for part in _IN_OTHER_TABLES))
    ]
    return Table("Held-out rows", ("metric", "value"), rows) if rows else None


def warn_of_emulation(trainer: Trainer) -> None:
    """Warn if the CPU emulates `trainer.precision`, which makes training several times slower."""
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(trainer.precision).partition("-")[0])
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if dtype and on_cpu and trainer.is_global_zero and (why := emulated(dtype)):
        _log.warning("trainer.precision %s: %s; --trainer.precision 32-true does not", trainer.precision, why)


def warn_of_random_weights(module: LayerSkipModule, ckpt_path: object) -> None:
    """Warn if a model is measured that has no weights from anywhere."""
    if ckpt_path is None and module.pretrained is None:
        _log.warning("no --ckpt_path is given: what follows is measured on random weights")


def warn_of_overflow(trainer: Trainer) -> None:
    """Warn if a measured loss is not finite; weights that are not finite have been refused before."""
    for name in (VAL_LOSS, TEST_LOSS):
        loss = trainer.callback_metrics.get(name)
        if loss is not None and not torch.isfinite(loss) and trainer.is_global_zero:
            what = f"{name} of {trainer.ckpt_path or 'this model'} is {float(loss)}"
            _log.warning("%s: its weights are finite, what follows is not: give trainer.precision more range", what)
