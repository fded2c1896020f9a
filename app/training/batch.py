"""What a datamodule hands to the module: which tensors, of what shapes, and what is refused at the first batch.

Shape legend: `B` rows, `T` tokens, `S` states of a token, `D` model width.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from app.errors import ConfigError
from app.layerskip.early_exit_loss import IGNORE_INDEX
from app.words import dtype_name

_log = logging.getLogger(__name__)


class GivenBatch(TypedDict):
    """A batch as a datamodule gives it: int64 tensors, but for the states.

    B and T are 1 or more and may differ between batches and ranks, but all ranks have the same number of batches.

    Attributes:
        input_ids: [B, T] in 0..V-1.
        labels: [B, T], the token that follows each position: labels[:, t] is what input_ids[:, t + 1] would be, and
            -100 where there is nothing to learn. The datamodule shifts them; transformers' models do so themselves.
        position_ids: [B, T]; 0 begins a document, and attention does not cross that. By default a row is a document.
        source: [B], indices of CorpusOwner.source_names (app.protocols) for the held-out losses by source; 0 by
            default.
        states: [B, T, S, D], of a floating-point type, as app.protocols.StateOwner tells. Where exit blocks are
            trained, they spare the pass through the frozen model.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: NotRequired[Tensor]
    source: NotRequired[Tensor]
    states: NotRequired[Tensor]


def completed(given: GivenBatch) -> GivenBatch:
    """The batch with defaults for what it lacks."""
    input_ids = given["input_ids"]
    if (positions := given.get("position_ids")) is None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if (source := given.get("source")) is None:
        source = input_ids.new_zeros(len(input_ids))
    batch: GivenBatch = {
        "input_ids": input_ids,
        "labels": given["labels"],
        "position_ids": positions,
        "source": source,
    }
    if "states" in given:
        batch["states"] = given["states"]
    return batch


def check_batch(given: Any, *, config: PreTrainedConfig, num_sources: int, num_states: int = 0) -> None:
    """Check one batch that a datamodule gives, for a model of this config; waits for the device.

    `num_states` is S of a module that reads states, 0 of others. ConfigError if it is not a GivenBatch, or its labels
    are not shifted.
    """
    names = [name for name in GivenBatch.__annotations__ if name != "states"]
    if not isinstance(given, Mapping) or not {"input_ids", "labels"} <= given.keys():
        got = list(given) if isinstance(given, Mapping) else type(given).__name__
        allowed = f"a dict of {', '.join(names)}; the last two may be missing"
        raise ConfigError("batch", got=got, allowed=allowed)
    shape = tuple(getattr(given["input_ids"], "shape", ()))
    if _described(given["input_ids"]) != f"int64 {shape}" or len(shape) != 2 or 0 in shape:
        raise ConfigError("batch.input_ids", got=_described(given["input_ids"]), allowed="int64 (rows, tokens a row)")
    for name in names:
        wanted = f"int64 {shape[:1] if name == 'source' else shape}"
        if name in given and _described(given[name]) != wanted:
            raise ConfigError(f"batch.{name}", got=_described(given[name]), allowed=f"{wanted}, as of input_ids")
    read = [*names, "attention_mask"]
    if num_states and "states" in given:
        _check_states(given["states"], (*shape, num_states, config.get_text_config().hidden_size))
        read.append("states")
    check_row_length(shape[1], config, field="batch.input_ids: tokens a row")
    _check_values(completed(cast(GivenBatch, given)), config=config, num_sources=num_sources)
    _check_shift(given["input_ids"], given["labels"])
    if "attention_mask" in given:
        _check_mask(given["attention_mask"], given["labels"])
    if unread := [name for name in given if name not in read]:
        _log.warning("of the batch, %s are not read (app.training.batch.GivenBatch)", ", ".join(map(str, unread)))


def _check_states(states: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(states, Tensor) or states.shape != shape or not states.is_floating_point():
        allowed = f"a floating-point tensor {shape}: rows, tokens, a state of each exit and the final one, width"
        raise ConfigError("batch.states", got=_described(states), allowed=allowed)


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{dtype_name(value.dtype)} {tuple(value.shape)}"


def _check_values(batch: GivenBatch, *, config: PreTrainedConfig, num_sources: int) -> None:
    vocab_size = config.get_text_config().vocab_size
    targets = batch["labels"][batch["labels"] != IGNORE_INDEX]
    of_sources = "indices of the datamodule's source_names (CorpusOwner)"
    for name, values, size, fix in (
        ("input_ids", batch["input_ids"], vocab_size, "the model's vocabulary"),
        ("labels", targets, vocab_size, f"or {IGNORE_INDEX} where there is nothing to learn"),
        ("position_ids", batch["position_ids"], longest_row(config), "they restart at 0 with each document"),
        ("source", batch["source"], num_sources, of_sources),
    ):
        wrong = values[(values < 0) | (values >= size)]
        if len(wrong):
            raise ConfigError(f"batch.{name}", got=int(wrong[0]), allowed=f"0..{size - 1}", fix=fix)


def _check_shift(input_ids_BT: Tensor, labels_BT: Tensor) -> None:
    """Refuse labels that repeat the inputs at their own positions, wherever a shifted label would be another token."""
    inputs, labels, following = input_ids_BT[:, :-1], labels_BT[:, :-1], input_ids_BT[:, 1:]
    telling = (labels != IGNORE_INDEX) & (inputs != following)
    if telling.sum() > 1 and bool((labels == inputs)[telling].all()):
        fix = "the model does not shift them: give input_ids=tokens[:, :-1], labels=tokens[:, 1:]"
        raise ConfigError("batch.labels", got="the inputs at their own positions", allowed="the next tokens", fix=fix)


def _check_mask(mask: Any, labels_BT: Tensor) -> None:
    """Accept only a mask that says no more than causal attention and labels do, since it is not read."""
    says_no_more = isinstance(mask, Tensor) and mask.shape == labels_BT.shape
    if says_no_more:
        padding = mask == 0
        at_the_end = bool((padding[:, :-1] <= padding[:, 1:]).all())
        says_no_more = at_the_end and bool((labels_BT[padding] == IGNORE_INDEX).all())
    if not says_no_more:
        allowed = f"none, or zeros only behind the last token of a row, where labels are {IGNORE_INDEX}"
        fix = "it is not read: pad at the right, and let position_ids restart at 0 with each document"
        raise ConfigError("batch.attention_mask", got=_described(mask), allowed=allowed, fix=fix)


def longest_row(config: PreTrainedConfig) -> float:
    """Tokens of the model's context; infinity if it has no limit."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return math.inf if longest is None else int(longest)


def check_row_length(seq_len: int, config: PreTrainedConfig, *, field: str = "seq_len") -> None:
    """Raise ConfigError if rows are longer than the model's context."""
    if seq_len > (longest := longest_row(config)):
        raise ConfigError(field, got=seq_len, allowed=f"1..{longest}, the model's max_position_embeddings")
