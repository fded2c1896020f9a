"""The ways to decode, as one closed table: what each needs, and who drafts in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from app.decoding.cost_model import CostModel
from app.decoding.drafters import DraftModelDrafter, EarlyExitDrafter, FullModel, LayerSkipDrafter
from app.decoding.settings import DecodingSettings
from app.errors import ConfigError, check_range
from app.protocols import ExitableDecoder

_log = logging.getLogger(__name__)

Strategy = Literal["autoregressive", "early_exit", "self_speculative", "draft_model", "layer_skip"]

# k, what a further position costs in a pass, as a share of one, until `tune` measures it. Where weights are read from
# memory for every pass it is near 0; products in float32 on a CPU soon wait for arithmetic (0.05 to 0.13 measured).
_EXTRA_TOKEN, _EXTRA_TOKEN_FLOAT32_CPU = 0.03, 0.08

NewDrafter = Callable[[ExitableDecoder, DecodingSettings, int, int], FullModel]


class StrategyEntry(NamedTuple):
    """A strategy.

    Attributes:
        needs: Settings it cannot do without; others of the same kind have no effect on it.
        new_drafter: Called with the decoder, the settings, the batch size and the capacity.
        costs: What its rounds cost by parameter counts; None where it never drafts.
        lossless: Whether its output is the full model's.
    """

    needs: frozenset[str]
    new_drafter: NewDrafter
    costs: Callable[[ExitableDecoder, DecodingSettings], CostModel] | None
    lossless: bool = True


def _full_model(decoder: ExitableDecoder, _: DecodingSettings, batch: int, capacity: int) -> FullModel:
    return FullModel(decoder, batch_size=batch, capacity=capacity)


def _early_exit(decoder: ExitableDecoder, settings: DecodingSettings, batch: int, capacity: int) -> FullModel:
    return FullModel(decoder, batch_size=batch, capacity=capacity, stop=settings.exit_layer)


def _self_speculative(decoder: ExitableDecoder, settings: DecodingSettings, batch: int, capacity: int) -> FullModel:
    assert settings.exit_layer is not None
    return EarlyExitDrafter(decoder, batch_size=batch, capacity=capacity, exit_layer=settings.exit_layer)


def _draft_model(decoder: ExitableDecoder, settings: DecodingSettings, batch: int, capacity: int) -> FullModel:
    assert settings.draft_decoder is not None
    return DraftModelDrafter(decoder, batch_size=batch, capacity=capacity, draft_decoder=settings.draft_decoder)


def _layer_skip(decoder: ExitableDecoder, settings: DecodingSettings, batch: int, capacity: int) -> FullModel:
    assert settings.skipped_layers is not None
    return LayerSkipDrafter(decoder, batch_size=batch, capacity=capacity, skipped_layers=settings.skipped_layers)


def _head(decoder: ExitableDecoder) -> float:
    """H, what unembedding one token costs, in blocks, by parameter counts."""
    return decoder.head_size / decoder.block_size


def _extra_token(decoder: ExitableDecoder) -> float:
    """By number type and device; embedding one token tells the type."""
    dtype = decoder.embed(torch.zeros(1, 1, dtype=torch.long, device=decoder.device)).dtype
    slow = dtype == torch.float32 and decoder.device.type == "cpu"
    return _EXTRA_TOKEN_FLOAT32_CPU if slow else _EXTRA_TOKEN


def _self_speculative_costs(decoder: ExitableDecoder, settings: DecodingSettings) -> CostModel:
    assert settings.exit_layer is not None
    return CostModel.self_speculative(
        num_layers=decoder.num_layers,
        exit_layer=settings.exit_layer,
        head=_head(decoder),
        extra_token=_extra_token(decoder),
    )


def _draft_model_costs(decoder: ExitableDecoder, settings: DecodingSettings) -> CostModel:
    assert settings.draft_decoder is not None
    small = settings.draft_decoder
    return CostModel.two_pass(
        num_layers=decoder.num_layers,
        head=_head(decoder),
        draft_step=(small.num_layers * small.block_size + small.head_size) / decoder.block_size,
        extra_token=_extra_token(decoder),
    )


def _layer_skip_costs(decoder: ExitableDecoder, settings: DecodingSettings) -> CostModel:
    assert settings.skipped_layers is not None
    return CostModel.two_pass(
        num_layers=decoder.num_layers,
        head=_head(decoder),
        draft_step=decoder.num_layers - len(set(settings.skipped_layers)) + _head(decoder),
        extra_token=_extra_token(decoder),
    )


STRATEGIES: dict[Strategy, StrategyEntry] = {
    "autoregressive": StrategyEntry(frozenset(), _full_model, None),
    "early_exit": StrategyEntry(frozenset({"exit_layer"}), _early_exit, None, lossless=False),
    "self_speculative": StrategyEntry(
        frozenset({"exit_layer", "num_draft_tokens"}), _self_speculative, _self_speculative_costs
    ),
    "draft_model": StrategyEntry(frozenset({"draft_decoder", "num_draft_tokens"}), _draft_model, _draft_model_costs),
    "layer_skip": StrategyEntry(frozenset({"skipped_layers", "num_draft_tokens"}), _layer_skip, _layer_skip_costs),
}
_OPTIONAL = ("exit_layer", "num_draft_tokens", "skipped_layers", "draft_decoder")


def check_settings(strategy: Strategy, settings: DecodingSettings, decoder: ExitableDecoder) -> None:
    """Refuse settings that this strategy cannot use with this model, and warn of those without effect.

    Raises:
        ConfigError: A setting is missing or out of range.
    """
    needs, num_layers = STRATEGIES[strategy].needs, decoder.num_layers
    if num_layers == 1 and strategy in ("self_speculative", "layer_skip"):
        fix = "it has no blocks to leave out"
        raise ConfigError("strategy", got=strategy, allowed="autoregressive, for a model of one block", fix=fix)
    for name in _OPTIONAL:
        value = getattr(settings, name)
        if name in needs and value is None:
            raise ConfigError(name, got=None, allowed=f"a value, with strategy {strategy}")
        if name not in needs and value is not None:
            shown = "" if name == "draft_decoder" else f"={value}"
            _log.warning("%s%s has no effect with strategy %s", name, shown, strategy)
    if settings.draft_policy != "fixed" and "num_draft_tokens" not in needs:
        _log.warning("draft_policy=%s has no effect with strategy %s", settings.draft_policy, strategy)
    if "exit_layer" in needs and settings.exit_layer is not None:
        highest = num_layers - 1 if strategy == "self_speculative" else num_layers
        fix = f"{num_layers} is the full model: use strategy autoregressive"
        check_range("exit_layer", settings.exit_layer, low=1, high=highest, fix=fix)
    if "skipped_layers" in needs and settings.skipped_layers is not None:
        wrong = [layer for layer in settings.skipped_layers if not 0 <= layer < num_layers]
        if wrong or not 0 < len(set(settings.skipped_layers)) < num_layers:
            allowed = f"between 1 and {num_layers - 1} block indices, each 0..{num_layers - 1}"
            raise ConfigError("skipped_layers", got=list(settings.skipped_layers), allowed=allowed)
    if "draft_decoder" in needs and settings.draft_decoder is not None:
        ours, theirs = decoder.vocab_size, settings.draft_decoder.vocab_size
        if theirs < ours:
            raise ConfigError("draft_model", got=f"vocabulary of {theirs}", allowed=f"at least the model's {ours}")
        ours, theirs = decoder.max_length, settings.draft_decoder.max_length
        if theirs < ours:
            _log.warning(
                "draft_model: its context of %d is shorter than the model's %d; drafts get worse there", theirs, ours
            )
