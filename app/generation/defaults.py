"""Defaults of decoding: what `layerskip tune` stored with the model, else rules of thumb."""

import logging
from dataclasses import replace
from typing import Any

from app.decoding.cost_model import CostModel
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import STRATEGIES, Strategy, check_settings
from app.generation.loaded_model import LoadedModel
from app.model_files.decoding_defaults import Conditions, DecodingDefaults, drafting_settings, read_decoding_defaults
from app.protocols import ExitableDecoder

_log = logging.getLogger(__name__)

_USUAL_DRAFTS = 3
_USUAL_MATCH = 3
_USUAL_SHARE = 4  # drafts run a quarter of the blocks


def choose_decoding(
    strategy: Strategy | None,
    settings: DecodingSettings,
    loaded: LoadedModel,
    *,
    batch_size: int = 1,
    n_grams: bool = True,
) -> tuple[Strategy, DecodingSettings]:
    """Fill in what is None of strategy, exit, drafts, n-grams and costs, and log what was chosen and why.

    An exit or a number of drafts without a strategy means self_speculative where a model has exits. What was tuned
    under other conditions is still the best guess, but its costs are not used.

    Args:
        batch_size: Number of prompts decoded together.
        n_grams: Whether n-grams may draft where the settings leave it open.

    Raises:
        ConfigError: Exit, drafts or skipped layers do not fit the model; then nothing is logged.
    """
    tuned = read_decoding_defaults(loaded.model)
    elsewhere = _elsewhere(tuned, conditions_of(loaded, batch_size=batch_size), loaded.decoder)
    num_layers, said = loaded.decoder.num_layers, list[str]()
    of_drafts = settings.exit_layer is not None or settings.num_draft_tokens is not None
    if strategy is None and num_layers == 1:  # the engine warns of an exit or drafts that have no effect
        strategy = "autoregressive" if settings.n_gram_match is None else "n_gram"
        _log.info("strategy %s: a model of one block has no earlier exit", strategy)
        return strategy, settings
    if strategy is None:
        strategy = "self_speculative" if tuned is None or of_drafts else tuned.strategy
        said.append(_say("strategy", strategy, tuned=tuned is not None and not of_drafts))
        if strategy == "autoregressive" and settings.n_gram_match is not None:
            strategy = "n_gram"
            said[-1] = _say("strategy", strategy, tuned=False)
    exit_layer, num_draft_tokens = settings.exit_layer, settings.num_draft_tokens
    needs = STRATEGIES[strategy].needs
    if exit_layer is None and "exit_layer" in needs:
        known = tuned and tuned.exit_layer
        own = next(iter(loaded.decoder.own_exits), None)
        exit_layer = known or own or max(1, num_layers // _USUAL_SHARE)
        said.append(_say("exit_layer", f"{exit_layer} of {num_layers}", tuned=bool(known)))
    if num_draft_tokens is None and "num_draft_tokens" in needs:
        same = tuned is not None and (strategy, exit_layer) == (tuned.strategy, tuned.exit_layer)
        known = tuned.num_draft_tokens if tuned is not None and same else None
        num_draft_tokens = known or _USUAL_DRAFTS
        said.append(_say("num_draft_tokens", num_draft_tokens, tuned=bool(known)))
    same = tuned is not None and (strategy, exit_layer) == (tuned.strategy, tuned.exit_layer)
    settings = replace(settings, exit_layer=exit_layer, num_draft_tokens=num_draft_tokens)
    settings = _with_policy(settings, tuned if same else None, said, loaded)
    usual = "n_gram_match" in needs
    n_grams = n_grams and (usual or settings.engine == "dynamic")  # static rounds have none
    settings = _with_n_grams(settings, tuned if same else None, said, usual=usual, may_draft=n_grams)
    _check(strategy, settings, loaded.decoder)
    if said:
        _log.info("defaults: %s; %s%s", ", ".join(said), _origin(tuned, strategy, settings), elsewhere)
    if strategy in ("self_speculative", "n_gram") and not elsewhere:
        settings = replace(settings, costs=_costs(tuned, loaded.decoder, exit_layer))
    return strategy, settings


def conditions_of(loaded: LoadedModel, *, batch_size: int = 1) -> Conditions:
    """What a measurement of this model on this machine is made under."""
    return replace(Conditions.of(loaded.model, batch_size=batch_size), dtype=loaded.weights_type)


def _with_policy(
    settings: DecodingSettings, tuned: DecodingDefaults | None, said: list[str], loaded: LoadedModel
) -> DecodingSettings:
    """Fill in what is None of draft policy and exits, and add to `said` what was chosen.

    Args:
        tuned: What was tuned for this strategy and exit.
    """
    policy, exit_layer, exits = settings.draft_policy, settings.exit_layer, settings.draft_exits
    if policy is None and tuned is not None and tuned.draft_policy != "fixed":
        policy = tuned.draft_policy
        if policy == "dynamic" and settings.engine == "static":  # which has one exit a request
            policy = "adaptive"
        said.append(_say("draft_policy", policy, tuned=policy == tuned.draft_policy))
    if policy == "dynamic" and exit_layer is not None and not exits:
        known = tuned.draft_exits if tuned is not None else ()
        num_layers, own = loaded.decoder.num_layers, loaded.decoder.own_exits
        usual = own if len(own) > 1 else (exit_layer // 2, 2 * exit_layer)
        exits = known or tuple(each for each in usual if 0 < each < num_layers and each != exit_layer)
        said.append(_say("draft_exits", list(exits), tuned=bool(known)))
    return replace(settings, draft_policy=policy, draft_exits=exits)


def _with_n_grams(
    settings: DecodingSettings, tuned: DecodingDefaults | None, said: list[str], *, usual: bool, may_draft: bool
) -> DecodingSettings:
    """Fill in what is None of the settings of n-grams, and add to `said` what was chosen.

    Args:
        tuned: What was tuned for this strategy and exit.
        usual: Whether n-grams draft where nothing was tuned.
        may_draft: Whether n-grams may draft where the settings leave it open.
    """
    match, most = settings.n_gram_match, settings.n_gram_max_drafts
    if match is None and may_draft:
        known = tuned and tuned.n_gram_match
        match = known or (_USUAL_MATCH if usual else None)
        said += [] if match is None else [_say("n_gram_match", match, tuned=bool(known))]
    if most is None and tuned is not None and match == tuned.n_gram_match:
        most = tuned.n_gram_max_drafts
        said += [] if most is None else [_say("n_gram_max_drafts", most, tuned=True)]
    return replace(settings, n_gram_match=match, n_gram_max_drafts=most)


def _check(strategy: Strategy, settings: DecodingSettings, decoder: ExitableDecoder) -> None:
    """Check the settings that the strategy uses; the engine warns of the others, which have no effect."""
    needs = STRATEGIES[strategy].needs
    names = {*needs, "engine", "compile_rounds", "sampling"} | (
        {"n_gram_match"} if STRATEGIES[strategy].costs else set()
    )
    used: dict[str, Any] = {name: getattr(settings, name) for name in names}
    if "draft_decoder" in needs:  # the caller loads the draft model later
        used["draft_decoder"] = decoder
    if STRATEGIES[strategy].has_drafter:
        used |= {"draft_policy": settings.draft_policy, "draft_exits": settings.candidate_exits[1:]}
    check_settings(strategy, DecodingSettings(max_new_tokens=settings.max_new_tokens, **used), decoder)


def _say(name: str, value: object, *, tuned: bool) -> str:
    return f"{name} {value} ({'tuned' if tuned else 'untuned'})"


def _elsewhere(tuned: DecodingDefaults | None, here: Conditions, decoder: ExitableDecoder) -> str:
    """Say under which other conditions the model was tuned; empty if they are the same or not known."""
    said, size = "", len(decoder.draft_vocabulary or range(decoder.vocab_size))
    if tuned is not None and tuned.conditions is not None and (other := tuned.conditions.differing(here)):
        said = f"; it was tuned for {tuned.conditions}; here {other}"
    if tuned is not None and tuned.draft_vocabulary_size not in (None, size):
        said += f"; it was tuned with drafts from {tuned.draft_vocabulary_size} token ids; here they are from {size}"
    return said


def _origin(tuned: DecodingDefaults | None, strategy: Strategy, settings: DecodingSettings) -> str:
    if tuned is None:
        return "layerskip tune finds what is fastest for a model"
    if tuned.strategy == "autoregressive":
        return "layerskip tune found no setting that is faster than autoregressive"
    setting = " and ".join(f"{name} {value}" for name, value in tuned.settings.items())
    if (tuned.strategy, tuned.settings) != (strategy, drafting_settings(settings)):
        return f"layerskip tune chose otherwise: {tuned.strategy} with {setting}"
    if tuned.measured_speedup is None:
        return "as stored with the model; layerskip tune measures what is fastest"
    return f"layerskip tune measured a speedup of {tuned.measured_speedup:.2f} with {setting}"


def _costs(tuned: DecodingDefaults | None, decoder: ExitableDecoder, exit_layer: int | None) -> CostModel | None:
    """The measured costs, which hold for any exit and for n-grams alone; None if they were not measured."""
    if tuned is None or tuned.head is None or tuned.extra_token is None:
        return None
    shared: dict[str, Any] = {
        "num_layers": decoder.num_layers,
        "head": tuned.head,
        "first_extra": tuned.first_extra or 0.0,
        "extra_token": tuned.extra_token,
        "overhead": tuned.overhead or 0.0,
    }
    if exit_layer is None:
        return CostModel.two_pass(draft_step=0.0, **shared)
    own = decoder.exit_block_size(exit_layer) / decoder.block_size
    return CostModel.self_speculative(exit_layer=exit_layer, num_exit_blocks=own, draft_head=tuned.draft_head, **shared)
