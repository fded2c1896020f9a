"""Counts of rounds of decoding, summed over prompts. Tested by tests/unit/benchmark/test_alternation.py."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from app.decoding.cost_model import CostModel


@dataclass(frozen=True, kw_only=True)
class RoundCounts:
    """Sums over prompts, so that those of disjoint parts add up; a ratio is None where its denominator is 0.

    A round is a step after the prompt's own pass. That pass yields the first token of an output, which is not counted.
    """

    decoded: int  # new tokens after the first of each output
    rounds: int
    drafted: int  # tokens proposed in the rounds
    accepted: int  # proposed tokens that the full model kept

    @staticmethod
    def total(parts: Sequence["RoundCounts"]) -> "RoundCounts":
        """The counts of all parts together."""
        names = [field.name for field in fields(RoundCounts)]
        return RoundCounts(**{name: sum(getattr(part, name) for part in parts) for name in names})

    @property
    def acceptance_rate(self) -> float | None:
        return ratio(self.accepted, self.drafted)

    @property
    def mean_tokens_per_round(self) -> float | None:
        return ratio(self.decoded, self.rounds)

    def predicted_speedup(self, costs: CostModel) -> float | None:
        """The speedup over autoregressive decoding if these rounds cost what `costs` says."""
        if not self.rounds:
            return None
        return costs.speedup(self.decoded / self.rounds, self.drafted / self.rounds)


def ratio(numerator: float, denominator: float) -> float | None:
    """The quotient, or None where there is nothing to divide by."""
    return numerator / denominator if denominator else None
