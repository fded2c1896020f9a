"""How much faster self-speculative decoding is than our own autoregressive decoding, on given prompts, here and now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

from app.benchmark.alternation import Measurement, alternate, engine_contender, ratio
from app.benchmark.speedup_interval import Interval, PairedTimes, interval_in_words, speedup_interval
from app.decoding.settings import DecodingSettings
from app.errors import ConfigError
from app.protocols import ExitableDecoder
from app.tables import Table, cell
from app.words import counted_of


@dataclass(frozen=True, kw_only=True)
class DecodingComparison:
    """One (exit_layer, num_draft_tokens) setting against autoregressive decoding of the same prompts.

    All times are decode time alone: the prompt's pass and the first token it yields are left out on both sides.
    A figure is None where there was nothing to divide by, for instance when every output ended at its first token.

    Counts and seconds are sums over the prompts, so that the parts of several ranks add up to the whole.

    Attributes:
        exit_layer: Blocks run by a draft.
        num_draft_tokens: Most tokens drafted in a round.
        num_prompts: Prompts measured before the time ran out.
        num_given: Prompts that there were.
        identical: Prompts with exactly the autoregressive output.
        drafted: Tokens proposed.
        accepted: Proposed tokens that the full model kept.
        rounds: Draft-and-verify rounds.
        decoded: Tokens after each prompt's first.
        seconds: Decode time of this setting.
        baseline_decoded: Tokens after each prompt's first of autoregressive decoding.
        baseline_seconds: Its decode time.
        seconds_squares: Of the seconds of each prompt, summed; for the interval of the speedup, as the two that follow.
        baseline_squares: The same of autoregressive decoding.
        seconds_products: Seconds of a prompt in both, multiplied and summed.
    """

    exit_layer: int
    num_draft_tokens: int
    num_prompts: int
    num_given: int
    identical: int
    drafted: int
    accepted: int
    rounds: int
    decoded: int
    seconds: float
    baseline_decoded: int
    baseline_seconds: float
    seconds_squares: float
    baseline_squares: float
    seconds_products: float

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens over all prompts."""
        return ratio(self.accepted, self.drafted)

    @property
    def mean_tokens_per_round(self) -> float | None:
        """Tokens settled by a draft-and-verify round."""
        return ratio(self.decoded, self.rounds)

    @property
    def autoregressive_tokens_per_second(self) -> float | None:
        """Of the full model, one token a step."""
        return ratio(self.baseline_decoded, self.baseline_seconds)

    @property
    def self_speculative_tokens_per_second(self) -> float | None:
        """Of this setting."""
        return ratio(self.decoded, self.seconds)

    @property
    def speedup(self) -> float | None:
        """Autoregressive / self-speculative mean time per token."""
        plain, own = self.autoregressive_tokens_per_second, self.self_speculative_tokens_per_second
        return own / plain if own and plain else None

    @property
    def speedup_interval(self) -> Interval | None:
        """The 95 % interval of the speedup over prompts like these."""
        sums = (self.seconds_squares, self.baseline_squares, self.seconds_products)
        return speedup_interval(self.speedup, PairedTimes(self.num_prompts, self.seconds, self.baseline_seconds, *sums))

    @property
    def identical_share(self) -> float:
        """Share of prompts with exactly the autoregressive output."""
        return self.identical / self.num_prompts


_SUMS = [field.name for field in fields(DecodingComparison) if field.name not in ("exit_layer", "num_draft_tokens")]


def pooled(parts: Sequence[Sequence[DecodingComparison]]) -> list[DecodingComparison]:
    """The comparisons of all prompts from those of disjoint parts of them, each with the same settings.

    Args:
        parts: For instance one of each rank; those that measured no prompt are empty and count for nothing.
    """
    return [
        replace(same[0], **{name: sum(getattr(comparison, name) for comparison in same) for name in _SUMS})
        for same in zip(*(part for part in parts if part), strict=True)
    ]


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
    plain = DecodingSettings(max_new_tokens=max_new_tokens, eos_token_ids=tuple(eos_token_ids))
    drafting = [
        replace(plain, exit_layer=exit_layer, num_draft_tokens=drafts)
        for exit_layer, drafts in product(exit_layers, num_draft_tokens)
    ]
    contenders = [
        engine_contender(decoder, "autoregressive", plain),
        *(engine_contender(decoder, "self_speculative", settings) for settings in drafting),
    ]
    baseline, *candidates = alternate(
        contenders,
        [[prompt] for prompt in prompts],
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        time_limit_seconds=time_limit_seconds,
    )
    return [measured_against(candidate, baseline, num_given=len(prompts)) for candidate in candidates]


def best_by_speedup(comparisons: Sequence[DecodingComparison]) -> DecodingComparison:
    """The fastest setting; the first one if none has a speedup."""
    return max(comparisons, key=lambda comparison: comparison.speedup or 0.0)


def comparison_table(comparisons: Sequence[DecodingComparison]) -> Table:
    """One row a setting; times are decode time, without the prompt's pass."""
    measured, given = (comparisons[0].num_prompts, comparisons[0].num_given) if comparisons else (0, 0)
    title = f"Self-speculative against autoregressive decoding, {counted_of(measured, given, 'prompt')}"
    return Table.of_columns(
        title,
        {
            "exit": [str(c.exit_layer) for c in comparisons],
            "drafts": [str(c.num_draft_tokens) for c in comparisons],
            "acceptance": [cell(c.acceptance_rate, "{:.1%}") for c in comparisons],
            "tokens/round": [cell(c.mean_tokens_per_round, "{:.2f}") for c in comparisons],
            "AR tok/s": [cell(c.autoregressive_tokens_per_second, "{:.1f}") for c in comparisons],
            "self-spec tok/s": [cell(c.self_speculative_tokens_per_second, "{:.1f}") for c in comparisons],
            "speedup": [cell(c.speedup, "{:.2f}x") for c in comparisons],
            "95 % interval": [interval_in_words(c.speedup_interval) for c in comparisons],
            "identical": [f"{c.identical} of {c.num_prompts}" for c in comparisons],
        },
    )


def measured_against(candidate: Measurement, baseline: Measurement, *, num_given: int) -> DecodingComparison:
    """What self-speculative decoding did, beside autoregressive decoding of the same prompts in turn with it.

    Args:
        candidate: The former.
        baseline: The latter.
        num_given: Prompts that there were, before the time ran out.
    """
    contender = candidate.contender
    assert contender.exit_layer is not None
    assert contender.num_draft_tokens is not None
    times = candidate.times_beside(baseline)
    return DecodingComparison(
        exit_layer=contender.exit_layer,
        num_draft_tokens=contender.num_draft_tokens,
        num_prompts=len(candidate.results),
        num_given=num_given,
        identical=sum(candidate.identical_to(baseline)),
        drafted=candidate.drafted,
        accepted=candidate.accepted,
        rounds=candidate.rounds,
        decoded=candidate.num_decoded,
        seconds=candidate.seconds,
        baseline_decoded=baseline.num_decoded,
        baseline_seconds=baseline.seconds,
        seconds_squares=times.own_squares,
        baseline_squares=times.baseline_squares,
        seconds_products=times.products,
    )
