"""Results of an evaluation of semantic parses as records, from which tables, metrics, files and figures are made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from app import metric_names
from app.benchmark.decoding_comparison import DecodingComparison
from app.errors import DataError
from app.intervals import share_interval
from app.tables import Table, cell
from app.topv2.evaluation import ParsePlan, ParseResult
from app.whole_file import write_whole

_SHARES = ("exact_match", "frame_match", "well_formed")
_SPEEDS = ("acceptance_rate", "mean_tokens_per_round", "ms_per_token", "speedup", "identical_share")

Metric = Literal["exact_match", "frame_match", "well_formed"]
_TITLES: dict[Metric, str] = {
    "exact_match": "exact match (%)",
    "frame_match": "exact match of intents, slots and slot texts (%)",
    "well_formed": "well-formed answers (%)",
}
_MARKERS = "osD^vPX*"  # they tell lines apart that coincide


@dataclass(frozen=True, kw_only=True)
class ParseReport:
    """The results of one evaluation, and the model they are of."""

    stage: str  # validate or test
    step: int | None  # optimizer steps the model has taken; None outside of fits, where that is not known
    checkpoint: str | None  # the source of its weights, if they were loaded
    num_ranks: int  # ranks that shared the examples
    plan: ParsePlan
    results: Sequence[ParseResult]  # in the order of the plan's ways

    def records(self) -> list[dict[str, Any]]:
        """Make a flat record for each way; a figure is None where it was not measured or has nothing to divide by.

        Keys: strategy, exit_layer, num_draft_tokens; num_examples, exact_match, frame_match, well_formed (shares) and
        by_group, the same of each group; acceptance_rate, mean_tokens_per_round, ms_per_token (decode time, without the
        prompt's pass), speedup and identical_share against autoregressive decoding, which is the record of 0 drafts.
        """
        compared = next((result.speed for result in self.results if result.speed is not None), None)
        return [
            result.way._asdict()
            | result.scores.overall._asdict()
            | {"by_group": {group: score._asdict() for group, score in result.scores.by_group.items()}}
            | _speeds(result.speed, compared if result.way.num_draft_tokens == 0 else None)
            for result in self.results
        ]


def report_metrics(report: ParseReport) -> dict[str, float]:
    """Return every figure to log, by its metric name."""
    logged = {}
    for record in report.records():
        at = report.stage, record["exit_layer"], record["num_draft_tokens"]
        for name in _SHARES if record["num_draft_tokens"] is None else ("exact_match", *_SPEEDS):
            logged[metric_names.parse_figure(name, *at)] = record[name]
        if record["num_draft_tokens"] is None:
            for group, score in record["by_group"].items():
                logged[metric_names.parse_figure(f"exact_match_by_domain/{group}", *at)] = score["exact_match"]
    return {name: float(value) for name, value in logged.items() if value is not None}


def report_table(report: ParseReport) -> Table:
    """Make a row for each way to decode, then one for each group of the full model."""
    records = report.records()
    full = records[0]
    titled = [("full model", full), *((record["strategy"].replace("_", " "), record) for record in records[1:])]
    if len(full["by_group"]) > 1:
        titled += [(f"full model: {group}", full | score) for group, score in full["by_group"].items()]
    columns: dict[str, tuple[str, str]] = {
        "exit": ("exit_layer", "{}"),
        "drafts": ("num_draft_tokens", "{}"),
        "rows": ("num_examples", "{}"),
        "exact": ("exact_match", "{:.1%}"),
        "frame": ("frame_match", "{:.1%}"),
        "valid": ("well_formed", "{:.1%}"),
        "accepted": ("acceptance_rate", "{:.1%}"),
        "ms/token": ("ms_per_token", "{:.2f}"),
        "speedup": ("speedup", "{:.2f}x"),
        "same": ("identical_share", "{:.1%}"),
    }
    rows = [(title, *(cell(record[key], style) for key, style in columns.values())) for title, record in titled]
    title = f"Semantic parses generated ({report.stage}"
    title += ")" if report.step is None else f", step {report.step})"
    if report.num_ranks > 1:
        title += f" on {report.num_ranks} ranks"
    return Table(title, ("decoding", *columns), rows)


def write_report(report: ParseReport, path: Path) -> None:
    """Write the records as a JSON file, whole or not at all, and its folders if need be."""
    document = vars(report) | {"plan": asdict(report.plan), "results": report.records()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_report(path: Path) -> dict[str, Any]:
    """Read the document that `write_report` wrote; DataError if there is none at this path."""
    try:
        document: dict[str, Any] = json.loads(path.read_text("utf-8"))
        keys = {"exit_layer", "num_draft_tokens", "num_examples", *_SHARES}
        records = document["results"]
        if not document["stage"] or not records or not all(keys <= record.keys() for record in records):
            raise KeyError(*sorted(keys))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        unlike = "not JSON" if isinstance(error, ValueError) else "something else"
        found = error.strerror if isinstance(error, OSError) else unlike
        fix = "write one with callbacks.ParseValidation"
        raise DataError(f"{path}: no results of semantic parses ({found}); {fix}") from error
    return document


def exact_match_figure(runs: Mapping[str, Mapping[str, Any]], *, metric: Metric = "exact_match") -> Figure:
    """Draw the metric of every run over the exits it was decoded at, with their 95 % intervals.

    `runs` gives each line's name and its document of `read_report`, whose self-speculative results are left out.
    """
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    axes = figure.subplots()
    stages, counts = set(), set()
    for marker, (label, document) in zip(cycle(_MARKERS), runs.items(), strict=False):
        records = [record for record in document["results"] if record["num_draft_tokens"] is None]
        records.sort(key=lambda record: record["exit_layer"])
        exits, shares = [r["exit_layer"] for r in records], [r[metric] for r in records]
        counts |= {r["num_examples"] for r in records}
        stages.add(document["stage"])
        bounds = [share_interval(share, r["num_examples"]) for share, r in zip(shares, records, strict=True)]
        errors = 100.0 * np.abs(np.transpose(bounds) - shares)
        style: dict[str, Any] = {"marker": marker, "markersize": 7, "capsize": 3, "alpha": 0.85}
        axes.errorbar(exits, [100.0 * share for share in shares], yerr=errors, label=label, **style)
    some = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    axes.set(
        title=f"{some} examples ({', '.join(sorted(stages))}); bars: 95 % intervals",
        xlabel="exit layer (blocks run; the last is the full model)",
        ylabel=_TITLES[metric],
        xlim=(0.0, None),
        ylim=(-2.0, 102.0),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _speeds(speed: DecodingComparison | None, against: DecodingComparison | None) -> dict[str, float | None]:
    """Give the speed of a way that drafts, or of autoregressive decoding, `against` which it ran."""
    figures: dict[str, float | None] = dict.fromkeys(_SPEEDS)
    if speed is not None:
        figures |= {name: getattr(speed, name) for name in _SPEEDS if name != "ms_per_token"}
    tokens_per_second = speed and speed.self_speculative_tokens_per_second
    if against is not None:
        tokens_per_second = against.autoregressive_tokens_per_second
    return figures | {"ms_per_token": 1e3 / tokens_per_second if tokens_per_second else None}
