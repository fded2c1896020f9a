"""Writes the results of an evaluation: JSON, and beside it a CSV file and a figure. Tested by test_results.py."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.evaluation.confident_exits_figure import confident_exits_figure
from app.evaluation.figure import evaluation_figure
from app.evaluation.records import Record
from app.evaluation.results import Result, as_csv, as_json, count_rows, main_metrics, results_of, shown
from app.evaluation.task import Task
from app.exits.confident_exit import ConfidentExit, confident_exits_table
from app.tables import Table
from app.whole_file import write_figure, write_whole
from app.words import counted


def write_results(
    output: Path,
    records: Sequence[Record],
    *,
    tasks: Mapping[str, Task],
    title: str,
    about: Mapping[str, Any],
) -> list[Result]:
    """Write all files, each whole or not at all, and return what is in them.

    Args:
        output: The JSON file; the others have its name with another ending.
        records: Of all examples.
        tasks: By name.
        title: Of the figure.
        about: What the document says beside the results: environment and settings.
    """
    results = results_of(records)
    counts = {task: found._asdict() for task, found in count_rows(records).items()}
    measured = {"rows": counts, "notes": notes(records, results), "metrics": main_metrics(results, tasks)}
    document = dict(about) | measured | {"results": as_json(results)}
    write_whole(output, json.dumps(document, indent=2, allow_nan=False) + "\n")
    write_whole(output.with_suffix(".csv"), as_csv(results))
    write_figure(output.with_suffix(".png"), evaluation_figure(shown(results, tasks), title=title))
    return results


def write_confident_exits(output: Path, found: Sequence[ConfidentExit], *, title: str) -> Table:
    """Write a CSV file and a figure beside the JSON file, and return the table for people."""
    write_whole(output.with_suffix(".thresholds.csv"), as_csv(found, ConfidentExit._fields))
    write_figure(output.with_suffix(".thresholds.png"), confident_exits_figure(found, title=title))
    return confident_exits_table(found, title=title)


def notes(records: Iterable[Record], results: Iterable[Result]) -> list[str]:
    """What a reader must know of the rows behind the figures."""
    said = []
    for task, found in count_rows(records).items():
        if found.truncated:
            whose = "its" if found.truncated == 1 else "their"
            said.append(
                f"{task}: {counted(found.truncated, 'prompt')} lost {whose} beginning, to fit the model's context"
            )
        if found.skipped:
            said.append(f"{task}: {counted(found.skipped, 'row')} skipped, longer than the model's context")
    differing: dict[str, str] = {}  # one note for all metrics of a task
    for each in results:
        if each.identical_share is not None and each.identical_share < 1 and not each.group:
            said_of = f"{each.task}: {1 - each.identical_share:.1%} of the answers drafted from exit {each.exit_layer}"
            differing[said_of] = (
                "differ from the full model's, where two tokens tie by rounding; float32 has fewer ties"
            )
    return [*said, *(f"{what} {why}" for what, why in differing.items())]
