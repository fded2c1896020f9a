"""The order of training rows as a checkpoint records it, and the refusal to resume in another one.

An optimizer step takes M micro-batches, the number of ranks times `accumulate_grad_batches`; the k-th of rank r of W is
number k W + r of them. Which rows micro-batch m of step t holds depends on M and not on W, so a run can resume on
another number of devices. Tested by tests/unit/datamodules/test_topv2.py and test_text_code.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from app.errors import ConfigError
from datamodules.loading.rank_share import RankShare
from datamodules.loading.tokenizers import TOKENIZER, check_same_tokenizer, fingerprint

_MICRO_BATCHES = "batches_per_step"  # the key of M in checkpoints
_NEW_RUN = "start a new run from the weights (--model.pretrained CHECKPOINT)"


def order_state(settings: Mapping[str, Any], *, trainer: Trainer | None, tokenizer: Any) -> dict[str, Any]:
    """What a datamodule saves of its order of training rows: all `settings` it depends on, M and the tokenizer."""
    return {**settings, _MICRO_BATCHES: RankShare.of(trainer).micro_batches, TOKENIZER: fingerprint(tokenizer)}


def resumes_order(trainer: Trainer | None) -> bool:
    """Whether a saved position matters: among a trainer's stages it does in fit alone."""
    return trainer is None or trainer.state.fn == TrainerFn.FITTING


def check_order(
    settings: Callable[[], Mapping[str, Any]], saved: Mapping[str, Any], *, trainer: Trainer | None, tokenizer: Any
) -> None:
    """Refuse to resume in another order of training rows or, at any stage, to feed the ids of another tokenizer.

    Args:
        settings: Returns what `order_state` takes; called in fit alone.
        saved: What `order_state` gave when the checkpoint was written.
        trainer: Of the datamodule.
        tokenizer: Of the data.

    Raises:
        ConfigError: Naming the first setting that differs.
    """
    if resumes_order(trainer):
        share = RankShare.of(trainer)
        for field, value in {**settings(), _MICRO_BATCHES: share.micro_batches}.items():
            if field not in saved or value != saved[field]:
                raise _difference(field, value, saved, share=share)
    check_same_tokenizer(tokenizer, saved)


def _difference(field: str, value: Any, saved: Mapping[str, Any], *, share: RankShare) -> ConfigError:
    name, restore = field, "restore it"
    if field == _MICRO_BATCHES:
        name = "trainer.accumulate_grad_batches times devices"
        if (wanted := saved.get(field)) and wanted % share.num_replicas == 0:
            restore += f" (--trainer.accumulate_grad_batches {wanted // share.num_replicas})"
    if field not in saved:
        allowed = "what the checkpoint does not tell: an earlier version wrote it, whose order of rows was another"
        return ConfigError(name, got=value, allowed=allowed, fix=_NEW_RUN)
    allowed = f"{saved[field]!r}, as in the checkpoint"
    fix = f"the order of training rows depends on it: {restore}, or {_NEW_RUN}"
    return ConfigError(name, got=value, allowed=allowed, fix=fix)
