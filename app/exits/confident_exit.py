"""What one way to leave early gives on a task, of an evaluation or of a report, and a table of such ways.

Tested by tests/unit/evaluation/test_confident_exits.py.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from app.tables import Table, cell, with_interval

# exit: all questions are answered at one exit. threshold: each at the first exit that is surer than a threshold.
# held_out: the same, with a threshold that was chosen on other questions than those it answers.
Way = Literal["exit", "threshold", "held_out"]
WAYS: dict[Way, str] = {
    "exit": "every question at one exit",
    "threshold": "at the first exit surer than a threshold",
    "held_out": "threshold chosen on the other half",
}
WAYS_TITLE = "answers at the first exit that is sure enough (lossy)"
MEAN_BLOCKS = "blocks a question runs through (mean)"


class ConfidentExit(NamedTuple):
    """What one way to leave early gives on a task.

    Attributes:
        metric: The task's own, acc or acc_norm.
        exit_layer: Of way exit.
        threshold: Of way threshold.
        score, low, high: Share of right answers, with its 95 % interval.
        same_answer: Share of the questions that get the answer of the deepest exit that was measured.
        mean_blocks: Blocks that a question runs through, those of exits included that have blocks of their own.
        mean_heads: Exits at which the head scores a question's choices; each costs a pass of norm and head over them.
    """

    task: str
    metric: str
    way: Way
    exit_layer: int | None
    threshold: float | None
    num_examples: int
    score: float
    low: float
    high: float
    same_answer: float
    mean_blocks: float
    mean_heads: float


def confident_exits_table(found: Sequence[ConfidentExit], *, title: str) -> Table:
    """One row for each task and way."""
    cells: dict[str, list[str]] = {
        "task": [f"{each.task} ({each.metric}, n = {each.num_examples})" for each in found],
        "leave": [way_label(each) for each in found],
        "right, %": [with_interval(each.score, each.low, each.high, is_share=True) for each in found],
        "answers of the\ndeepest exit, %": [cell(100 * each.same_answer, "{:.1f}") for each in found],
        "blocks a\nquestion": [cell(each.mean_blocks, "{:.1f}") for each in found],
        "heads a\nquestion": [cell(each.mean_heads, "{:.1f}") for each in found],
    }
    return Table.of_columns(f"{title}: {WAYS_TITLE}", cells)


def way_label(found: ConfidentExit) -> str:
    """The way in a few words."""
    if found.way == "exit":
        return f"all at exit {found.exit_layer}"
    return WAYS["held_out"] if found.threshold is None else f"surer than {found.threshold:g}"
