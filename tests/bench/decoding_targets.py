"""Targets for the speed of decoding, and how each is read off a benchmark's report. Tested by test_benches.py."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Result = Mapping[str, Any]  # one entry of a report's `results`
# Subjects: a LayerSkip-trained model, a pretrained one, and a small one trained on TOPv2.
Run = Literal["trained", "pretrained", "topv2"]


class Target(NamedTuple):
    """A ratio that should be reached."""

    run: Run  # the benchmark it is read off
    threshold: float  # the least value that passes, or the largest where `at_most` is set
    value: Callable[[Sequence[Result]], float | None]  # None where the benchmark lacks the runs it needs
    at_most: bool = False


class Winners(NamedTuple):
    """The settings that came out fastest where every exit was tried with every draft length."""

    exit_layer: int
    num_draft_tokens: int
    transformers_num_draft_tokens: int | None  # of transformers' early exit at the same exit; None if not measured

    def only(self, results: Sequence[Result]) -> list[Result]:
        """The results without the settings of these strategies that did not win."""
        settings = {
            "self_speculative": (self.exit_layer, self.num_draft_tokens),
            "transformers_early_exit": (self.exit_layer, self.transformers_num_draft_tokens),
        }
        return [r for r in results if settings.get(r["strategy"], _setting(r)) == _setting(r)]


def winners(results: Sequence[Result]) -> Winners | None:
    """The fastest exit and draft length with identical output, and transformers' best draft length at that exit.

    Their times are the luckiest of many: measure them again before anything is said about them.
    """
    lossless = (result for result in results if result["identical_to_autoregressive"] == 1.0)
    if (ours := _best(lossless, "self_speculative")) is None:
        return None
    same_exit = (result for result in results if result["exit_layer"] == ours["exit_layer"])
    theirs = _best(same_exit, "transformers_early_exit")
    drafts = None if theirs is None else theirs["num_draft_tokens"]
    return Winners(ours["exit_layer"], ours["num_draft_tokens"], drafts)


def decode_vs_transformers(results: Sequence[Result]) -> float | None:
    """Speed of our autoregressive decoding over that of transformers' generate."""
    return _ratio(_best(results, "autoregressive"), _best(results, "transformers"))


def self_speculative_speedup(results: Sequence[Result]) -> float | None:
    """Self-speculation over our autoregressive decoding, if its output is the same."""
    lossless = (result for result in results if result["identical_to_autoregressive"] == 1.0)
    return _ratio(_best(lossless, "self_speculative"), _best(results, "autoregressive"))


def vs_transformers_early_exit(results: Sequence[Result]) -> float | None:
    """Self-speculation over transformers' assistant_early_exit at the same exit."""
    return _ratio(_best(results, "self_speculative"), _best(results, "transformers_early_exit"))


def speedup_prediction_error(results: Sequence[Result]) -> float | None:
    """How far the measured speedup is from that of the cost model, T(a, d) (L + H) / C, as a share of the latter."""
    ours = _best(results, "self_speculative")
    if ours is None or not ours["speedup"] or not ours["predicted_speedup"]:
        return None
    return abs(float(ours["speedup"]) / float(ours["predicted_speedup"]) - 1.0)


TARGETS: dict[str, Target] = {
    "decode_vs_transformers": Target("pretrained", 1.25, decode_vs_transformers),
    "decode_vs_transformers_topv2": Target("topv2", 1.6, decode_vs_transformers),
    "self_speculative_speedup": Target("trained", 2.0, self_speculative_speedup),
    "speedup_prediction_error": Target("trained", 0.15, speedup_prediction_error, at_most=True),
    "vs_transformers_early_exit": Target("trained", 1.7, vs_transformers_early_exit),
}


def _setting(result: Result) -> tuple[int | None, int | None]:
    return result["exit_layer"], result["num_draft_tokens"]


def _best(results: Iterable[Result], strategy: str) -> Result | None:
    """The fastest run of a strategy."""
    runs = [result for result in results if result["strategy"] == strategy and result["tokens_per_second"]]
    return max(runs, key=lambda result: float(result["tokens_per_second"]), default=None)


def _ratio(ours: Result | None, theirs: Result | None) -> float | None:
    if ours is None or theirs is None:
        return None
    return float(ours["tokens_per_second"]) / float(theirs["tokens_per_second"])
