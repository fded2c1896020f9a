"""Scores of exits on tasks as a table, of an evaluation or of a report.

Tested by tests/unit/evaluation/test_results.py and test_generation_results.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from app.tables import Table, with_interval

# The fields of app.evaluation.results.Result; files of earlier runs may lack the later ones.
ScoreEntry = Mapping[str, Any]


def score_table(results: Sequence[ScoreEntry], *, title: str, num_layers: int | None = None) -> Table:
    """Score and 95 % interval, a row for each exit and a column for each task and metric; the last row is of guessing.

    What the full model checks has a row of its own beside that of the exit that drafts for it.

    Args:
        results: What is shown, each with another task, group, metric, exit or strategy.
        num_layers: The exit that is the full model, where that is known.
    """
    ways = sorted({_way(each) for each in results})
    first = {_column(each): each for each in reversed(results)}
    columns = dict.fromkeys(map(_column, results))
    found = {(_column(each), _way(each)): each for each in results}
    rows = []
    for way in ways:
        own = [found.get((column, way)) for column in columns]
        label = _way_label([each for each in own if each is not None], num_layers=num_layers)
        rows.append((label, *map(_score, own)))
    chances = [first[column].get("chance") for column in columns]
    if any(chance is not None for chance in chances):
        rows.append(("guessing", *("-" if chance is None else f"{100 * chance:.1f}" for chance in chances)))
    heads = (f"{task_name(task, group)}\n{_metric(first[task, group, metric])}" for task, group, metric in columns)
    return Table(f"{title}: score (95 % interval)", ("exit", *heads), rows)


def task_name(task: str, group: str) -> str:
    """The name of a task, or of a part of its examples."""
    return f"{task}/{group}" if group else task


def _column(result: ScoreEntry) -> tuple[str, str, str]:
    return result["task"], result["group"], result["metric"]


def _way(result: ScoreEntry) -> tuple[int, bool]:
    """By which rows are told apart and ordered: the exit, and whether it only drafts."""
    return result["exit_layer"], result["strategy"] == "self_speculative"


def _way_label(results: Sequence[ScoreEntry], *, num_layers: int | None) -> str:
    """What a row is of, such as "exit 6, self-speculative (lossless, 1.8x)" in two lines.

    Its results share the exit, and all of them or none only draft from it.
    """
    strategies, exit_layer = {each["strategy"] for each in results}, results[0]["exit_layer"]
    if "self_speculative" in strategies:
        speedups = sorted({f"{each['speedup']:.1f}x" for each in results if each.get("speedup") is not None})
        range_ = " to ".join(dict.fromkeys((speedups[0], speedups[-1]))) if speedups else "speed unknown"
        return f"exit {exit_layer}, self-speculative\n(lossless, {range_})"
    if exit_layer == num_layers or "autoregressive" in strategies:
        return f"exit {exit_layer}, full model"
    return f"exit {exit_layer}" + (", early exit\n(lossy)" if "early_exit" in strategies else "")


def _metric(result: ScoreEntry) -> str:
    return f"{result['metric']}{', %' if _is_share(result) else ''}\nn = {result['num_examples']}"


def _is_share(result: ScoreEntry) -> bool:
    return bool(result["metric"] != "perplexity")


def _score(result: ScoreEntry | None) -> str:
    if result is None:
        return "-"
    return with_interval(result["score"], result.get("low"), result.get("high"), is_share=_is_share(result))
