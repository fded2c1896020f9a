"""How much faster self-speculative decoding is than our own autoregressive decoding, on given prompts, here and now."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from app.benchmark.alternation import Measurement, alternate, drafting_contenders
from app.benchmark.speedup_interval import PairedTimes, interval_in_words, speedup_interval
from app.decoding.result import DecodingResult, RoundCounts, ratio
from app.decoding.settings import DecodingSettings
from app.errors import ConfigError
from app.intervals import Interval
from app.protocols import ExitableDecoder
from app.tables import Table, cell
from app.words import counted_of


@dataclass(frozen=True, kw_only=True)
class DecodingComparison(RoundCounts):
    """One (exit_layer, num_draft_tokens) setting against autoregressive decoding of the same prompts.

    All times are decode time alone: the prompt's pass and the first token it yields are left out on both sides.
    """

    exit_layer: int
    num_draft_tokens: int
    num_given: int  # prompts that there were, before the time ran out
    identical: int  # prompts with exactly the autoregressive output
    baseline_decoded: int  # tokens of autoregressive decoding after the first of each output
    times: PairedTimes  # seconds of both, summed over the prompts that were measured
    outputs: tuple[DecodingResult, ...] = field(default=(), compare=False)  # of the first part's prompts, in order

    @property
    def num_prompts(self) -> int:
        return self.times.num

    @property
    def autoregressive_tokens_per_second(self) -> float | None:
        return ratio(self.baseline_decoded, self.times.baseline)

    @property
    def self_speculative_tokens_per_second(self) -> float | None:
        return ratio(self.num_decoded, self.times.own)

    @property
    def speedup(self) -> float | None:
        plain, own = self.autoregressive_tokens_per_second, self.self_speculative_tokens_per_second
        return own / plain if own and plain else None

    @property
    def speedup_interval(self) -> Interval | None:
        return speedup_interval(self.speedup, self.times)

    @property
    def identical_share(self) -> float:
        return self.identical / self.num_prompts


def pool_comparisons(parts: Sequence[Sequence[DecodingComparison]]) -> list[DecodingComparison]:
    """The comparisons of all prompts, from those of disjoint parts of them, such as ranks; a part may be empty."""
    return [
        replace(
            same[0],
            **vars(RoundCounts.total(same)),
            num_given=sum(comparison.num_given for comparison in same),
            identical=sum(comparison.identical for comparison in same),
            baseline_decoded=sum(comparison.baseline_decoded for comparison in same),
            times=PairedTimes(*map(sum, zip(*(comparison.times for comparison in same), strict=True))),
        )
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
) -> list[DecodingComparison]:
    """Decode greedily, prompt by prompt, autoregressively and with every (exit, drafts) setting, exits outermost.

    Args:
        decoder: The model, in eval mode.
        prompts: At least one; used in this order.
        exit_layers: Exits to draft from, each 1..num_layers-1; every exit is measured with every draft length.
        max_new_tokens: Budget of each output, at least 2: the first token costs no decode time.
        eos_token_ids: End an output early; with none, every prompt is decoded to the full length.
        time_limit_seconds: No prompt is started after this; the first is always measured.
    """
    if not prompts:
        raise ConfigError("prompts", got="0 prompts", allowed="at least one")
    plain = DecodingSettings(max_new_tokens=max_new_tokens, eos_token_ids=tuple(eos_token_ids))
    contenders = drafting_contenders(decoder, plain, product(exit_layers, num_draft_tokens))
    batches = [[prompt] for prompt in prompts]
    baseline, *candidates = alternate(contenders, batches, repeats=1, time_limit_seconds=time_limit_seconds)
    return [compare_measurements(candidate, baseline, num_given=len(prompts)) for candidate in candidates]


def compare_measurements(candidate: Measurement, baseline: Measurement, *, num_given: int) -> DecodingComparison:
    """Compare self-speculative decoding with autoregressive decoding of the same prompts, one prompt a batch."""
    settings = candidate.contender.settings
    assert settings.exit_layer is not None
    assert settings.num_draft_tokens is not None
    return DecodingComparison(
        **vars(candidate.counts),
        exit_layer=settings.exit_layer,
        num_draft_tokens=settings.num_draft_tokens,
        num_given=num_given,
        identical=sum(candidate.identical_to(baseline)),
        baseline_decoded=baseline.counts.num_decoded,
        times=candidate.times_beside(baseline),
        outputs=tuple(candidate.results),
    )


def comparison_table(comparisons: Sequence[DecodingComparison]) -> Table:
    """Make one row a setting; times are decode time, without the prompt's pass."""
    title = "Self-speculative against autoregressive decoding, "
    title += counted_of(comparisons[0].num_prompts, comparisons[0].num_given, "prompt")
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
