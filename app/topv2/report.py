"""Results of an evaluation of semantic parses: as records, which a table, metrics and a file are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app import metric_names
from app.benchmark.decoding_comparison import DecodingComparison
from app.errors import DataError
from app.tables import Table, cell
from app.topv2.evaluation import ParsePlan, ParseResult
from app.whole_file import write_whole

_SHARES = ("exact_match", "frame_match", "well_formed")
_SPEEDS = ("acceptance_rate", "mean_tokens_per_round", "ms_per_token", "speedup", "identical_share")


@dataclass(frozen=True, kw_only=True)
class ParseReport:
    """One evaluation.

    Attributes:
        stage: validate or test.
        step: Optimizer steps the model has taken; None where that is not known, outside of fits.
        checkpoint: Where its weights were loaded from, if they were.
        num_ranks: Ranks that shared the examples.
        plan: What was asked for.
        results: Of each way of the plan, in its order.
    """

    stage: str
    step: int | None
    checkpoint: str | None
    num_ranks: int
    plan: ParsePlan
    results: Sequence[ParseResult]

    def records(self) -> list[dict[str, Any]]:
        """One flat record a way to decode; a figure is None where it was not measured, or nothing to divide by.

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
    """Everything to log: exact match also by group."""
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
    """One row a way to decode, then one a group for the full model."""
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
    """Write the records as a JSON file, whole or not at all; folders are made."""
    document = {
        "stage": report.stage,
        "step": report.step,
        "checkpoint": report.checkpoint,
        "num_ranks": report.num_ranks,
        "plan": asdict(report.plan),
        "results": report.records(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_report(path: Path) -> dict[str, Any]:
    """The document that `write_report` wrote.

    Raises:
        DataError: There is none at this place.
    """
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
    else:
        return document


def _speeds(speed: DecodingComparison | None, against: DecodingComparison | None) -> dict[str, float | int | None]:
    """Of a way that drafts, or of autoregressive decoding, which has only its time in a comparison."""
    figures: dict[str, float | int | None] = dict.fromkeys(_SPEEDS)
    if against is not None:
        return figures | {"ms_per_token": _milliseconds(against.autoregressive_tokens_per_second)}
    if speed is None:
        return figures
    return {
        "acceptance_rate": speed.acceptance_rate,
        "mean_tokens_per_round": speed.mean_tokens_per_round,
        "ms_per_token": _milliseconds(speed.self_speculative_tokens_per_second),
        "speedup": speed.speedup,
        "identical_share": speed.identical_share,
    }


def _milliseconds(tokens_per_second: float | None) -> float | None:
    return 1e3 / tokens_per_second if tokens_per_second else None
