"""Whether training may go on in the order of rows that a checkpoint tells of: the same answer for all datamodules.

An optimizer step takes M micro-batches, ranks times `accumulate_grad_batches`; the k-th of rank r of W is number
k W + r of them. Which rows micro-batch m of step t holds depends on M and not on W: so a run goes on on another number
of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from app.errors import ConfigError
from datamodules.placement import Placement
from datamodules.tokenizers import TOKENIZER, check_same_tokenizer, fingerprint

_MICRO_BATCHES = "batches_per_step"  # M: as checkpoints have it, no user sets it by that name
_NEW_RUN = "start a new run from the weights (--model.pretrained CHECKPOINT)"


def order_state(settings: Mapping[str, Any], *, trainer: Trainer | None, tokenizer: Any) -> dict[str, Any]:
    """What a datamodule saves of its order of training rows.

    Args:
        settings: All that the order depends on, beside the micro-batches of a step.
        trainer: Of the datamodule.
        tokenizer: Of the data.
    """
    return {**settings, _MICRO_BATCHES: Placement.of(trainer).micro_batches, TOKENIZER: fingerprint(tokenizer)}


def goes_on(trainer: Trainer | None) -> bool:
    """Whether a saved place is gone on from: of a trainer's stages in fit alone."""
    return trainer is None or trainer.state.fn == TrainerFn.FITTING


def check_order(
    settings: Callable[[], Mapping[str, Any]], saved: Mapping[str, Any], *, trainer: Trainer | None, tokenizer: Any
) -> None:
    """Refuse to go on in another order of training rows; or, at any stage, to feed the ids of another tokenizer.

    Args:
        settings: As for `order_state`; asked in fit alone.
        saved: What that gave when the checkpoint was written.
        trainer: Of the datamodule.
        tokenizer: Of the data.

    Raises:
        ConfigError: Naming the first setting that differs.
    """
    if goes_on(trainer):
        place = Placement.of(trainer)
        for field, value in {**settings(), _MICRO_BATCHES: place.micro_batches}.items():
            if field not in saved or value != saved[field]:
                raise _differs(field, value, saved, place=place)
    check_same_tokenizer(tokenizer, saved)


def _differs(field: str, value: Any, saved: Mapping[str, Any], *, place: Placement) -> ConfigError:
    name, restore = field, "restore it"
    if field == _MICRO_BATCHES:
        name = "trainer.accumulate_grad_batches times devices"
        if (wanted := saved.get(field)) and wanted % place.world_size == 0:
            restore += f" (--trainer.accumulate_grad_batches {wanted // place.world_size})"
    if field not in saved:
        allowed = "what the checkpoint does not tell: an earlier version wrote it, whose order of rows was another"
        return ConfigError(name, got=value, allowed=allowed, fix=_NEW_RUN)
    allowed = f"{saved[field]!r}, as in the checkpoint"
    fix = f"the order of training rows depends on it: {restore}, or {_NEW_RUN}"
    return ConfigError(name, got=value, allowed=allowed, fix=fix)
