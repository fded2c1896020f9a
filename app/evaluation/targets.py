"""Performance targets that this project sets itself, and how each is read off a benchmark's report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Result = Mapping[str, Any]  # one entry of a report's `results`


class Target(NamedTuple):
    """A ratio that should be reached.

    Attributes:
        threshold: The least value that passes.
        value: Reads it off the results of one report; None where the runs it needs are not in it.
    """

    threshold: float
    value: Callable[[Sequence[Result]], float | None]


def decode_vs_transformers(results: Sequence[Result]) -> float | None:
    """Speed of our autoregressive decoding over that of transformers' generate."""
    return _ratio(_best(results, "autoregressive"), _best(results, "transformers"))


def self_speculative_speedup(results: Sequence[Result]) -> float | None:
    """The best (exit, drafts) over our autoregressive decoding, of settings with identical output."""
    lossless = (result for result in results if result["identical_to_autoregressive"] == 1.0)
    return _ratio(_best(lossless, "self_speculative"), _best(results, "autoregressive"))


def vs_transformers_early_exit(results: Sequence[Result]) -> float | None:
    """Self-speculation over transformers' assistant_early_exit at the same exit, each at its own best draft length.

    Of all exits the one where self-speculation is fastest counts.
    """
    ours = _best(results, "self_speculative")
    if ours is None:
        return None
    same_exit = (result for result in results if result["exit_layer"] == ours["exit_layer"])
    return _ratio(ours, _best(same_exit, "transformers_early_exit"))


TARGETS: dict[str, Target] = {
    "decode_vs_transformers": Target(1.25, decode_vs_transformers),
    "self_speculative_speedup": Target(2.0, self_speculative_speedup),
    "vs_transformers_early_exit": Target(1.7, vs_transformers_early_exit),
}


def _best(results: Iterable[Result], strategy: str) -> Result | None:
    """The fastest run of a strategy."""
    runs = [result for result in results if result["strategy"] == strategy and result["tokens_per_second"]]
    return max(runs, key=lambda result: float(result["tokens_per_second"]), default=None)


def _ratio(ours: Result | None, theirs: Result | None) -> float | None:
    if ours is None or theirs is None:
        return None
    return float(ours["tokens_per_second"]) / float(theirs["tokens_per_second"])
