"""Turns what was found out about examples into one table of exits and tasks: means with standard errors.

Tested by tests/unit/evaluation/test_results.py.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from app.evaluation.records import Record, Strategy
from app.evaluation.task import ChoiceTask, Task, TextTask
from app.tables import Table

_ALL = ""  # the group of all examples of a task


class Result(NamedTuple):
    """A metric of one task at one exit.

    Attributes:
        group: The part of the task's examples, such as a subject or source; "" for all.
        metric: perplexity (of a token), or a share of the examples.
        num_examples: How many there were.
        standard_error: Of the score; None for a single example.
        chance: The score of a guess, None where there is no such thing.
    """

    task: str
    group: str
    exit_layer: int
    strategy: Strategy
    metric: str
    num_examples: int
    score: float
    standard_error: float | None
    chance: float | None


class TaskCounts(NamedTuple):
    """How many rows of a task were scored, were skipped as too long, and had their beginning left out."""

    scored: int
    skipped: int
    truncated: int


def count_rows(records: Iterable[Record]) -> dict[str, TaskCounts]:
    """The counts of each task."""
    counts: dict[str, TaskCounts] = {}
    for record in records:
        before = counts.get(record.task, TaskCounts(0, 0, 0))
        found = (int(bool(record.scores)), int(not record.scores), int(record.truncated))
        counts[record.task] = TaskCounts(*(old + new for old, new in zip(before, found, strict=True)))
    return counts


def results_of(records: Iterable[Record]) -> list[Result]:
    """The results of each task, of all its examples and then of each group if there are several, by exit."""
    tasks: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        if record.scores:
            tasks.setdefault(record.task, {}).setdefault(record.group, []).append(record)
    results: list[Result] = []
    for task, groups in tasks.items():
        parts = {_ALL: [record for each in groups.values() for record in each]}
        if len(groups) > 1:
            parts |= dict(sorted(groups.items()))
        elif _is_text(parts[_ALL][0]):
            parts = groups  # the one source is named
        for group, members in parts.items():
            results += _results(task, group, members)
    return results


def _is_text(record: Record) -> bool:
    return "loss" in record.scores[0].values


def _results(task: str, group: str, records: Sequence[Record]) -> Iterator[Result]:
    values: dict[tuple[Strategy, int, str], list[tuple[float, float]]] = {}
    for record in records:
        for score in record.scores:
            for metric, value in score.values.items():
                values.setdefault((score.strategy, score.exit_layer, metric), []).append((value, record.weight))
    chances = [record.chance for record in records if record.chance is not None]
    chance = math.fsum(chances) / len(chances) if chances else None
    for (strategy, exit_layer, metric), pairs in sorted(values.items()):
        mean, error = mean_and_error(pairs)
        if metric == "loss":
            metric, mean = "perplexity", math.exp(min(mean, 700.0))  # what is beyond has no float
            error = None if error is None else mean * error
        yield Result(task, group, exit_layer, strategy, metric, len(pairs), mean, error, chance)


def mean_and_error(pairs: Sequence[tuple[float, float]]) -> tuple[float, float | None]:
    """The weighted mean of (value, weight), and its standard error, None for a single value.

    With equal weights the error is s / sqrt(n), with s the standard deviation of the sample.
    """
    total = math.fsum(weight for _, weight in pairs)
    mean = math.fsum(value * weight for value, weight in pairs) / total
    if (n := len(pairs)) == 1:
        return mean, None
    squares = math.fsum((weight * (value - mean)) ** 2 for value, weight in pairs)
    return mean, math.sqrt(squares * n / (n - 1)) / total


def shown(results: Sequence[Result], tasks: Mapping[str, Task]) -> list[Result]:
    """The results for tables and figures: one metric of each task, and of texts each source."""
    kept = []
    for result in results:
        task = tasks[result.task]
        first = next(each.metric for each in results if each.task == result.task)
        metric = task.metric if isinstance(task, ChoiceTask) else first
        if result.metric == metric and (result.group == _ALL or isinstance(task, TextTask)):
            kept.append(result)
    return kept


def column(result: Result) -> str:
    """The name of a result's column."""
    return f"{result.task}/{result.group}" if result.group else result.task


def exits_table(results: Sequence[Result], tasks: Mapping[str, Task], *, num_layers: int, title: str) -> Table:
    """A row for each exit, a column for each task: score and standard error; the last row is that of guessing."""
    kept = shown(results, tasks)
    ways = sorted({(each.strategy == "self_speculative", each.exit_layer) for each in kept})
    names = list(dict.fromkeys(column(each) for each in kept))
    first = {name: next(each for each in kept if column(each) == name) for name in names}
    found = {(column(each), each.strategy == "self_speculative", each.exit_layer): each for each in kept}
    rows = [(_way(*way, num_layers=num_layers), *(_score(found.get((name, *way))) for name in names)) for way in ways]
    if any(each.chance is not None for each in kept):
        chances = (first[name].chance for name in names)
        rows.append(("guessing", *("-" if chance is None else f"{100 * chance:.1f}" for chance in chances)))
    headers = (f"{name}\n{_title(first[name])}" for name in names)
    return Table(title, ("exit", *headers), rows)


def _title(result: Result) -> str:
    return f"{result.metric}{'' if result.metric == 'perplexity' else ', %'}\nn = {result.num_examples}"


def _way(drafts: bool, exit_layer: int, *, num_layers: int) -> str:
    if drafts:
        return f"{exit_layer} drafts,\nfull model verifies"
    return f"{exit_layer} (full)" if exit_layer == num_layers else str(exit_layer)


def _score(result: Result | None) -> str:
    if result is None:
        return "-"
    scale, style = (1, ".2f") if result.metric == "perplexity" else (100, ".1f")
    if scale * result.score >= 1e5:
        style = ".1e"
    text = f"{scale * result.score:{style}}"
    return text if result.standard_error is None else f"{text} ± {scale * result.standard_error:{style}}"


def as_csv(results: Sequence[Result]) -> str:
    """One line for each task, group, exit and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Result._fields)
    writer.writerows(results)
    return text.getvalue()


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as objects."""
    return [result._asdict() for result in results]
