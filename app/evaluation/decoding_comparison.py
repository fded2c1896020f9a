"""How much faster self-speculative decoding is than our own autoregressive decoding, on given prompts, here and now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from time import perf_counter

from app.decoding.engine import decode
from app.decoding.result import DecodingResult
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import Strategy
from app.errors import ConfigError, check_range
from app.protocols import ExitableDecoder, Table

_WARM_UP_TOKENS = 8
_Contender = tuple[Strategy, DecodingSettings]


@dataclass(frozen=True, kw_only=True)
class DecodingComparison:
    """One (exit_layer, num_draft_tokens) setting against autoregressive decoding of the same prompts.

    All times are decode time alone: the prompt's pass and the first token it yields are left out on both sides.
    A figure is None where there was nothing to divide by, for instance when every output ended at its first token.

    Attributes:
        num_prompts: Prompts measured before the time ran out.
        acceptance_rate: Accepted / drafted tokens over all prompts.
        mean_tokens_per_round: Tokens settled by a draft-and-verify round.
        autoregressive_tokens_per_second: Of the full model, one token a step.
        self_speculative_tokens_per_second: Of this setting.
        speedup: Autoregressive / self-speculative mean time per token.
        identical_share: Share of prompts with exactly the autoregressive output.
    """

    exit_layer: int
    num_draft_tokens: int
    num_prompts: int
    acceptance_rate: float | None
    mean_tokens_per_round: float | None
    autoregressive_tokens_per_second: float | None
    self_speculative_tokens_per_second: float | None
    speedup: float | None
    identical_share: float


def compare_decoding(
    decoder: ExitableDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    exit_layers: Sequence[int],
    num_draft_tokens: Sequence[int],
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    time_limit_seconds: float,
    repeats: int = 1,
) -> list[DecodingComparison]:
    """Decode greedily, prompt by prompt, autoregressively and with every (exit, drafts) setting in turn.

    Alternating within one process lets the noise of the machine fall on all alike.

    Args:
        decoder: The model, in eval mode.
        prompts: At least one; they are used in this order.
        exit_layers: Exits to draft from, each 1..num_layers-1.
        num_draft_tokens: Draft lengths, each at least 1; every exit is measured with every length.
        max_new_tokens: For each output, at least 2: the first token costs no decode time.
        eos_token_ids: End an output early; empty decodes every prompt to the full length.
        time_limit_seconds: No prompt is started after this; the first is always measured.
        repeats: Times each prompt is decoded by each setting; the median time counts.

    Returns:
        One comparison for each setting, exits outermost.
    """
    if not prompts or not exit_layers or not num_draft_tokens:
        got = f"{len(prompts)} prompts, {len(exit_layers)} exits, {len(num_draft_tokens)} draft lengths"
        raise ConfigError("prompts, exit_layers, num_draft_tokens", got=got, allowed="at least one of each")
    check_range("max_new_tokens", max_new_tokens, low=2)
    check_range("repeats", repeats, low=1)
    started = perf_counter()
    plain = DecodingSettings(max_new_tokens=max_new_tokens, eos_token_ids=tuple(eos_token_ids))
    drafting = [
        replace(plain, exit_layer=exit_layer, num_draft_tokens=drafts)
        for exit_layer, drafts in product(exit_layers, num_draft_tokens)
    ]
    contenders: list[_Contender] = [("autoregressive", plain)]
    contenders += [("self_speculative", settings) for settings in drafting]
    _decode_in_turn(decoder, prompts[0], contenders, max_new_tokens=min(max_new_tokens, _WARM_UP_TOKENS))
    measured: list[list[DecodingResult]] = []  # by prompt: autoregressive, then each setting
    for prompt in prompts:
        repeated = [_decode_in_turn(decoder, prompt, contenders, max_new_tokens=max_new_tokens) for _ in range(repeats)]
        measured.append([_median_time(results) for results in zip(*repeated, strict=True)])
        if perf_counter() - started > time_limit_seconds:
            break
    baseline, *candidates = zip(*measured, strict=True)
    return [
        _compare(settings, baseline=baseline, candidate=candidate)
        for settings, candidate in zip(drafting, candidates, strict=True)
    ]


def best_by_speedup(comparisons: Sequence[DecodingComparison]) -> DecodingComparison:
    """The fastest setting; the first one if none has a speedup."""
    return max(comparisons, key=lambda comparison: comparison.speedup or 0.0)


def comparison_table(comparisons: Sequence[DecodingComparison]) -> Table:
    """One row a setting; times are decode time, without the prompt's pass."""
    num_prompts = comparisons[0].num_prompts if comparisons else 0
    rows: list[tuple[str, ...]] = [
        (
            str(c.exit_layer),
            str(c.num_draft_tokens),
            _figure(c.acceptance_rate, "{:.1%}"),
            _figure(c.mean_tokens_per_round, "{:.2f}"),
            _figure(c.autoregressive_tokens_per_second, "{:.1f}"),
            _figure(c.self_speculative_tokens_per_second, "{:.1f}"),
            _figure(c.speedup, "{:.2f}x"),
            f"{c.identical_share:.0%}",
        )
        for c in comparisons
    ]
    columns = ("exit", "drafts", "acceptance", "tokens/round", "AR tok/s", "self-spec tok/s", "speedup", "identical")
    return Table(f"Self-speculative against autoregressive decoding, {num_prompts} prompts", columns, rows)


def table_as_markdown(table: Table) -> str:
    """The table with its title, as TensorBoard and GitHub render it."""
    lines = [table.columns, ("---",) * len(table.columns), *table.rows]
    return f"**{table.title}**\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _decode_in_turn(
    decoder: ExitableDecoder, prompt: Sequence[int], contenders: Sequence[_Contender], *, max_new_tokens: int
) -> list[DecodingResult]:
    """Decode one prompt with each contender."""
    return [
        decode(decoder, prompt, strategy=strategy, settings=replace(settings, max_new_tokens=max_new_tokens))
        for strategy, settings in contenders
    ]


def _median_time(repeats: Sequence[DecodingResult]) -> DecodingResult:
    """The first of these repeats with the median of all their decode times; greedy tokens do not differ."""
    return replace(repeats[0], seconds_decode=median(result.seconds_decode for result in repeats))


def _compare(
    settings: DecodingSettings, *, baseline: Sequence[DecodingResult], candidate: Sequence[DecodingResult]
) -> DecodingComparison:
    """Pool the prompts: every figure is a ratio of sums, so that long outputs weigh more than short ones."""
    assert settings.exit_layer is not None
    assert settings.num_draft_tokens is not None
    decoded = sum(result.num_decoded for result in candidate)
    baseline_speed = _ratio(sum(r.num_decoded for r in baseline), sum(r.seconds_decode for r in baseline))
    speed = _ratio(decoded, sum(result.seconds_decode for result in candidate))
    identical = sum(ours.tokens == theirs.tokens for ours, theirs in zip(candidate, baseline, strict=True))
    return DecodingComparison(
        exit_layer=settings.exit_layer,
        num_draft_tokens=settings.num_draft_tokens,
        num_prompts=len(candidate),
        acceptance_rate=_ratio(sum(r.accepted for r in candidate), sum(r.drafted for r in candidate)),
        mean_tokens_per_round=_ratio(decoded, sum(r.rounds for r in candidate)),
        autoregressive_tokens_per_second=baseline_speed,
        self_speculative_tokens_per_second=speed,
        speedup=speed / baseline_speed if speed and baseline_speed else None,
        identical_share=identical / len(candidate),
    )


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _figure(value: float | None, style: str) -> str:
    return "-" if value is None else style.format(value)
