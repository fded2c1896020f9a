"""Turns what was found out about examples into one table of exits and tasks: means with 95 % intervals.

Tested by tests/unit/evaluation/test_results.py.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from app.decoding.result import ratio
from app.evaluation.records import Decoded, Record, Strategy
from app.evaluation.task import ChoiceTask, Task, TextTask
from app.exits.score_table import score_table, task_name
from app.intervals import share_interval, student_t
from app.tables import Table

_ALL = ""  # the group of all examples of a task


class Result(NamedTuple):
    """A metric of one task at one exit.

    Attributes:
        group: The part of the task's examples, such as a subject or source; "" for all.
        metric: perplexity (of a token), or a share of the examples.
        num_examples: How many there were.
        standard_error: Of the score; None for a single example.
        low, high: The score's 95 % interval; None for the perplexity of a single window.
        chance: The score of a guess, None where there is no such thing.
        lossless: Whether the full model wrote or checked every token; None where nothing was generated.
        ms_per_token: Decode time without the prompt's pass, in the batches of this evaluation; None as above.
        speedup: Over autoregressive decoding of the same examples in the same batches, for what drafts.
        acceptance_rate, identical_share: Of the drafted tokens, those that the full model kept; of the examples, those
            with the very tokens of autoregressive decoding. For what drafts.
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
    lossless: bool | None = None
    ms_per_token: float | None = None
    speedup: float | None = None
    acceptance_rate: float | None = None
    identical_share: float | None = None
    low: float | None = None
    high: float | None = None


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
    decoded: dict[tuple[Strategy, int], list[Decoded]] = {}
    for record in records:
        for score in record.scores:
            if score.decoded is not None:
                decoded.setdefault((score.strategy, score.exit_layer), []).append(score.decoded)
            for metric, value in score.values.items():
                values.setdefault((score.strategy, score.exit_layer, metric), []).append((value, record.weight))
    speeds = _speeds(decoded)
    chances = [record.chance for record in records if record.chance is not None]
    chance = math.fsum(chances) / len(chances) if chances else None
    for (strategy, exit_layer, metric), pairs in sorted(values.items()):
        mean, error = mean_and_error(pairs)
        low: float | None = None
        high: float | None = None
        if metric != "loss":
            low, high = share_interval(mean, len(pairs))
        else:
            if error is not None:
                spread = student_t(len(pairs)) * error
                low, high = _perplexity(mean - spread), _perplexity(mean + spread)
            metric, mean = "perplexity", _perplexity(mean)
            error = None if error is None else mean * error
        found = Result(task, group, exit_layer, strategy, metric, len(pairs), mean, error, chance)
        yield found._replace(low=low, high=high, **speeds.get((strategy, exit_layer), {}))


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # what is beyond has no float


def _speeds(decoded: Mapping[tuple[Strategy, int], Sequence[Decoded]]) -> dict[tuple[Strategy, int], dict[str, Any]]:
    """The fields of a Result that tell how each strategy decoded from each exit; ratios are those of sums."""
    plain = next((parts for (strategy, _), parts in decoded.items() if strategy == "autoregressive"), ())
    seconds_plain = ratio(sum(each.seconds for each in plain), sum(each.tokens for each in plain))
    speeds = {}
    for (strategy, exit_layer), parts in decoded.items():
        seconds = ratio(sum(each.seconds for each in parts), sum(each.tokens for each in parts))
        fields: dict[str, Any] = {"lossless": strategy != "early_exit"}
        fields["ms_per_token"] = None if seconds is None else 1000 * seconds
        if strategy == "self_speculative":
            fields["speedup"] = ratio(seconds_plain or 0.0, seconds or 0.0)
            fields["acceptance_rate"] = ratio(sum(each.accepted for each in parts), sum(each.drafted for each in parts))
            fields["identical_share"] = ratio(sum(each.identical is True for each in parts), len(parts))
        speeds[strategy, exit_layer] = fields
    return speeds


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
    metrics = main_metrics(results, tasks)
    return [
        result
        for result in results
        if result.metric == metrics[result.task] and (result.group == _ALL or isinstance(tasks[result.task], TextTask))
    ]


def main_metrics(results: Sequence[Result], tasks: Mapping[str, Task]) -> dict[str, str]:
    """The metric by which each task is judged: of multiple choice its own, of others the first."""
    return {
        result.task: task.metric if isinstance(task := tasks[result.task], ChoiceTask) else result.metric
        for result in reversed(results)
    }


def column(result: Result) -> str:
    """The name of a result's column."""
    return task_name(result.task, result.group)


def exits_table(results: Sequence[Result], tasks: Mapping[str, Task], *, num_layers: int, title: str) -> Table:
    """What is shown of the results, an exit a row."""
    return score_table(as_json(shown(results, tasks)), title=title, num_layers=num_layers)


def as_csv(results: Iterable[tuple[Any, ...]], fields: Sequence[str] = Result._fields) -> str:
    """One line for each result, such as a task, group, exit and metric, below the names of its fields."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows(results)
    return text.getvalue()


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as objects."""
    return [result._asdict() for result in results]
