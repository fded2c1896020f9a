"""What a user leaves open about decoding: taken from `layerskip tune` where it was run, else from rules of thumb."""

from __future__ import annotations

import logging
from dataclasses import replace

from app.cli.models import LoadedModel
from app.decoding.cost_model import CostModel
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import STRATEGIES, Strategy
from app.model.decoding_defaults import DecodingDefaults, read_decoding_defaults

_log = logging.getLogger(__name__)

_USUAL_DRAFTS = 3
_USUAL_SHARE = 4  # a quarter of the blocks drafts


def choose_decoding(
    strategy: Strategy | None, settings: DecodingSettings, loaded: LoadedModel
) -> tuple[Strategy, DecodingSettings]:
    """Fill in strategy, exit, drafts and costs, and say on stderr what was chosen and where it comes from.

    Who names an exit or a number of drafts but no strategy wants self_speculative.

    Args:
        strategy: None is open.
        settings: With None where the user left something open.
        loaded: The model.
    """
    tuned = read_decoding_defaults(loaded.model)
    num_layers, said = loaded.decoder.num_layers, list[str]()
    if strategy is None:
        of_drafts = settings.exit_layer is not None or settings.num_draft_tokens is not None
        known = tuned is not None and not of_drafts
        strategy = tuned.strategy if tuned is not None and known else "self_speculative"
        said.append(_say("strategy", strategy, tuned=known))
    exit_layer, num_draft_tokens = settings.exit_layer, settings.num_draft_tokens
    needs = STRATEGIES[strategy].needs
    if exit_layer is None and "exit_layer" in needs:
        known = tuned is not None and tuned.exit_layer is not None
        exit_layer = tuned.exit_layer if tuned is not None and known else max(1, num_layers // _USUAL_SHARE)
        said.append(_say("exit_layer", f"{exit_layer} of {num_layers}", tuned=known))
    if num_draft_tokens is None and "num_draft_tokens" in needs:
        known = tuned is not None and strategy == tuned.strategy and exit_layer == tuned.exit_layer
        num_draft_tokens = tuned.num_draft_tokens if tuned is not None and known else _USUAL_DRAFTS
        said.append(_say("num_draft_tokens", num_draft_tokens, tuned=known))
    if said:
        _log.info("defaults: %s; %s", ", ".join(said), _origin(tuned))
    costs = None if strategy != "self_speculative" or exit_layer is None else _costs(tuned, num_layers, exit_layer)
    return strategy, replace(settings, exit_layer=exit_layer, num_draft_tokens=num_draft_tokens, costs=costs)


def _say(name: str, value: object, *, tuned: bool) -> str:
    return f"{name} {value} ({'tuned' if tuned else 'untuned'})"


def _origin(tuned: DecodingDefaults | None) -> str:
    if tuned is None:
        return "layerskip tune finds what is fastest for a model"
    if tuned.measured_speedup is None:
        return "layerskip tune found no setting that is faster than autoregressive"
    return (
        f"layerskip tune measured a speedup of {tuned.measured_speedup:.2f} with exit_layer {tuned.exit_layer} and"
        f" num_draft_tokens {tuned.num_draft_tokens}"
    )


def _costs(tuned: DecodingDefaults | None, num_layers: int, exit_layer: int) -> CostModel | None:
    """Measured costs, which depend on the exit only by the number of blocks; None if they were not measured."""
    if tuned is None or tuned.head is None or tuned.extra_token is None:
        return None
    return CostModel.self_speculative(
        num_layers=num_layers,
        exit_layer=exit_layer,
        head=tuned.head,
        extra_token=tuned.extra_token,
        overhead=tuned.overhead or 0.0,
    )
