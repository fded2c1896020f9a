"""The ways to decode, as one closed table: which settings each needs, who drafts, and what its rounds cost."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from app.decoding.cost_model import CostModel
from app.decoding.drafters import DraftModelDrafter, EarlyExitDrafter, FullModel, LayerSkipDrafter
from app.decoding.fixed_sequence import check_compiler
from app.decoding.mixed_exits import MixedExitDrafter
from app.decoding.settings import DecodingSettings
from app.errors import ConfigError, check_range
from app.protocols import ExitableDecoder

_log = logging.getLogger(__name__)

Strategy = Literal["autoregressive", "early_exit", "self_speculative", "draft_model", "layer_skip", "n_gram"]

# k, the share of a pass that a further position costs, until `tune` measures it. It is near 0 where every pass reads
# weights from memory. Products in float32 on a CPU soon wait for arithmetic (0.05 to 0.13 measured).
_EXTRA_TOKEN, _EXTRA_TOKEN_FLOAT32_CPU = 0.03, 0.08


class StrategyEntry(NamedTuple):
    """What a strategy needs, who drafts for it, and what its rounds cost."""

    needs: frozenset[str]  # settings it cannot do without; others of the same kind have no effect on it
    new_drafter: Callable[[ExitableDecoder, DecodingSettings, int, int], FullModel]  # ..., batch size, capacity
    costs: Callable[[ExitableDecoder, DecodingSettings], CostModel] | None  # by parameter counts; None: never drafts
    lossless: bool = True  # whether its output is the full model's, whatever its settings

    @property
    def has_drafter(self) -> bool:
        """Whether something drafts that costs time; n-grams do not."""
        return "num_draft_tokens" in self.needs


def _sizes(decoder: ExitableDecoder) -> dict[str, Any]:
    """Arguments that the cost models share: L, then H by parameter counts, then k by number type and device."""
    dtype = decoder.embed(torch.zeros(1, 1, dtype=torch.long, device=decoder.device)).dtype
    slow = dtype == torch.float32 and decoder.device.type == "cpu"
    return {
        "num_layers": decoder.num_layers,
        "head": decoder.head_size / decoder.block_size,
        "extra_token": _EXTRA_TOKEN_FLOAT32_CPU if slow else _EXTRA_TOKEN,
    }


def _self_speculative_costs(decoder: ExitableDecoder, settings: DecodingSettings) -> CostModel:
    assert settings.exit_layer is not None
    return CostModel.self_speculative(
        exit_layer=settings.exit_layer,
        num_exit_blocks=decoder.exit_block_size(settings.exit_layer) / decoder.block_size,
        draft_head=decoder.draft_head_size / decoder.block_size,
        **_sizes(decoder),
    )


def _new_exit_drafter(
    decoder: ExitableDecoder, settings: DecodingSettings, batch_size: int, capacity: int
) -> EarlyExitDrafter | MixedExitDrafter:
    drafter = MixedExitDrafter if settings.draft_policy == "dynamic" else EarlyExitDrafter
    return drafter(decoder, settings, batch_size, capacity)


def _draft_model_costs(decoder: ExitableDecoder, settings: DecodingSettings) -> CostModel:
    small = settings.draft_decoder
    assert small is not None
    draft_step = (small.num_layers * small.block_size + small.head_size) / decoder.block_size
    return CostModel.two_pass(draft_step=draft_step, **_sizes(decoder))


def _layer_skip_costs(decoder: ExitableDecoder, settings: DecodingSettings) -> CostModel:
    assert settings.skipped_layers is not None
    sizes = _sizes(decoder)
    kept = decoder.num_layers - len(set(settings.skipped_layers))
    return CostModel.two_pass(draft_step=kept + decoder.draft_head_size / decoder.block_size, **sizes)


def _n_gram_costs(decoder: ExitableDecoder, _: DecodingSettings) -> CostModel:
    return CostModel.two_pass(draft_step=0.0, **_sizes(decoder))


STRATEGIES: dict[Strategy, StrategyEntry] = {
    "autoregressive": StrategyEntry(
        frozenset(), lambda decoder, _, batch, capacity: FullModel(decoder, batch, capacity), None
    ),
    "early_exit": StrategyEntry(
        frozenset({"exit_layer"}),
        lambda decoder, settings, batch, capacity: FullModel(decoder, batch, capacity, stop=settings.exit_layer),
        None,
        lossless=False,
    ),
    "self_speculative": StrategyEntry(
        frozenset({"exit_layer", "num_draft_tokens"}), _new_exit_drafter, _self_speculative_costs
    ),
    "draft_model": StrategyEntry(
        frozenset({"draft_decoder", "num_draft_tokens"}), DraftModelDrafter, _draft_model_costs
    ),
    "layer_skip": StrategyEntry(frozenset({"skipped_layers", "num_draft_tokens"}), LayerSkipDrafter, _layer_skip_costs),
    "n_gram": StrategyEntry(
        frozenset({"n_gram_match"}),
        lambda decoder, _, batch, capacity: FullModel(decoder, batch, capacity),
        _n_gram_costs,
    ),
}


def is_lossless(strategy: str, *, exit_layer: int | None, num_layers: int) -> bool:
    """Whether a strategy, also one of transformers, gives the full model's output; an exit after all blocks does."""
    return strategy not in STRATEGIES or STRATEGIES[strategy].lossless or exit_layer == num_layers


def check_settings(strategy: Strategy, settings: DecodingSettings, decoder: ExitableDecoder) -> None:
    """Refuse settings that this strategy cannot use with this model, and warn of those without effect.

    Raises:
        ConfigError: A setting is missing or out of range.
    """
    entry, num_layers = STRATEGIES[strategy], decoder.num_layers
    needs = entry.needs
    if num_layers == 1 and strategy in ("self_speculative", "layer_skip"):
        fix = "it has no blocks to leave out"
        raise ConfigError("strategy", got=strategy, allowed="autoregressive, for a model of one block", fix=fix)
    for name in ("exit_layer", "num_draft_tokens", "skipped_layers", "draft_decoder", "n_gram_match"):
        value = getattr(settings, name)
        if name in needs and value is None:
            raise ConfigError(name, got=None, allowed=f"a value, with strategy {strategy}")
        takes = name in needs or (name == "n_gram_match" and entry.costs is not None)
        if value is not None and not takes:
            shown = "" if name == "draft_decoder" else f"={value}"
            _log.warning("%s%s has no effect with strategy %s", name, shown, strategy)
    if settings.engine == "static":
        _check_static(strategy, settings)
    if settings.compile_rounds:
        check_compiler(decoder.device)
    can_be_off = entry.costs is not None and settings.draft_policy == "off"
    if settings.policy != "fixed" and not entry.has_drafter and not can_be_off:
        _log.warning("draft_policy=%s has no effect with strategy %s", settings.policy, strategy)
    if settings.draft_policy == "dynamic" and entry.has_drafter and "exit_layer" not in needs:
        fix = "it has no exits to choose from"
        raise ConfigError("draft_policy", got="dynamic", allowed=f"fixed | adaptive | off with {strategy}", fix=fix)
    if settings.draft_exits and (settings.draft_policy != "dynamic" or strategy != "self_speculative"):
        said = f"strategy {strategy}" if strategy != "self_speculative" else f"draft_policy {settings.policy}"
        _log.warning("draft_exits=%s has no effect with %s", list(settings.draft_exits), said)
    if "exit_layer" in needs and settings.exit_layer is not None:
        highest = num_layers - 1 if strategy == "self_speculative" else num_layers
        fix = f"{num_layers} is the full model: use strategy autoregressive"
        check_range("exit_layer", settings.exit_layer, low=1, high=highest, fix=fix)
        for exit_layer in settings.candidate_exits[1:]:
            check_range("draft_exits", exit_layer, low=1, high=highest, fix=fix)
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
                "draft_model: its context of %d is shorter than the model's %d; drafts beyond it get worse",
                theirs,
                ours,
            )


def _check_static(strategy: Strategy, settings: DecodingSettings) -> None:
    refused = {
        f"strategy {strategy}": strategy not in ("autoregressive", "early_exit", "self_speculative"),
        "n_gram_match": settings.n_gram_match is not None,
        "draft_policy dynamic": settings.draft_policy == "dynamic",
        "a processor of scores": settings.sampling.processor is not None,
    }
    if found := [name for name, is_given in refused.items() if is_given]:
        fix = "n_gram_match 0 drafts without n-grams" if "n_gram_match" in found else ""
        raise ConfigError("engine", got="static", allowed=f"dynamic with {' and '.join(found)}", fix=fix)


def check_request(
    decoder: ExitableDecoder,
    prompts: Sequence[Sequence[int]],
    settings: DecodingSettings,
    generators: Sequence[torch.Generator] | None,
) -> None:
    """Refuse prompts the model cannot take, while they are plain integers and checking waits for no device.

    Raises:
        ConfigError: A prompt, an end of sequence or a generator cannot be used with this model.
    """
    if not prompts:
        raise ConfigError("prompts", got=[], allowed="at least one prompt")
    for prompt in prompts:
        if not prompt:
            raise ConfigError("prompt_tokens", got=[], allowed="at least one token", fix="start from a BOS token")
        if len(prompt) > decoder.max_length:
            allowed = f"at most {decoder.max_length} tokens, the model's context"
            raise ConfigError("prompt_tokens", got=f"{len(prompt)} tokens", allowed=allowed)
    for field, tokens in (
        *(("prompt_tokens", prompt) for prompt in prompts),
        ("eos_token_ids", settings.eos_token_ids),
    ):
        for token in {min(tokens, default=0), max(tokens, default=0)}:
            check_range(field, token, low=0, high=decoder.vocab_size - 1, fix="use the model's own tokenizer")
    if not settings.sampling.greedy and len(generators or ()) != len(prompts):
        allowed = f"one torch.Generator on {decoder.device} for each prompt when temperature > 0"
        raise ConfigError("generators", got=generators, allowed=allowed)
