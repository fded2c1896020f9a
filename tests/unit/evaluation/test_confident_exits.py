"""Answers at confident exits, by hand: who leaves where, what that costs, and how a threshold is chosen."""

import math

import pytest

from app.errors import ConfigError
from app.evaluation.confident_exits import (
    Answer,
    check_thresholds,
    confident_exits,
    temperature_of,
)
from app.evaluation.confident_exits_figure import confident_exits_figure
from app.evaluation.evaluate import Work
from app.evaluation.records import Record, Score
from app.evaluation.rows import Item
from app.evaluation.task import ChoiceExample
from app.evaluation.tasks import TASKS
from app.exits.confident_exit import confident_exits_table

OWN_BLOCKS = {2: 1, 4: 0, 6: 0}  # exit 2 has a block of its own


def _work(name, *rows):
    """A task whose rows are the probabilities of two choices at each exit; the second choice is right."""
    example = ChoiceExample("q", (" no", " yes"), 1)
    items = [Item(row, "", "", example) for row in range(len(rows))]
    records = {}
    for row, probabilities in enumerate(rows):
        logs = {
            str(layer): [math.log(1 - yes) - 3, math.log(yes) - 3]
            for layer, yes in zip(OWN_BLOCKS, probabilities, strict=True)
        }
        score = Score(6, "likelihood", {"acc": 1.0})
        records[name, row] = Record(name, row, "", (score,), detail={"log_likelihoods": logs})
    return Work(TASKS[name], None, items), records


@pytest.fixture
def taken_as_they_are(monkeypatch):
    """The temperature of every exit is 1."""
    monkeypatch.setattr("app.evaluation.confident_exits.temperature_of", lambda _: 1.0)


def _found(*rows, thresholds, name="boolq"):
    work, records = _work(name, *rows)
    return confident_exits([work], records, thresholds, own_blocks=OWN_BLOCKS)


def _of(found, way, **settings):
    (one,) = [e for e in found if e.way == way and all(getattr(e, name) == each for name, each in settings.items())]
    return one


ROWS = [(0.9, 0.2, 0.8), (0.3, 0.7, 0.6), (0.05, 0.5, 0.9), (0.6, 0.4, 0.3)]


@pytest.mark.usefixtures("taken_as_they_are")
def test_each_question_leaves_at_the_first_exit_that_is_surer_than_the_threshold():
    found = _found(*ROWS, thresholds=[0.65, 0.8])
    low, high = (_of(found, "threshold", threshold=each) for each in (0.65, 0.8))
    # Row 0 leaves at exit 2 and is right, row 1 there with the wrong choice, row 2 likewise, row 3 at exit 6, wrong.
    assert (low.score, low.same_answer) == (0.25, 0.5)
    assert low.mean_blocks == (3 + 3 + 3 + 7) / 4
    assert low.mean_heads == (1 + 1 + 1 + 3) / 4
    # Row 1 now goes down to exit 6, where it is right.
    assert (high.score, high.same_answer) == (0.5, 0.75)
    assert high.mean_blocks == (3 + 7 + 3 + 7) / 4
    only = _of(found, "exit", exit_layer=2)
    assert (only.score, only.mean_blocks, only.mean_heads) == (0.5, 3, 1)
    full = _of(found, "exit", exit_layer=6)
    assert (full.score, full.same_answer, full.mean_blocks, full.mean_heads) == (0.75, 1.0, 6, 1)


@pytest.mark.usefixtures("taken_as_they_are")
def test_confidence_is_by_what_the_metric_ranks():
    values = [(math.log(0.2) - 3) / 2, (math.log(0.8) - 3) / 3]  # "no" has two bytes and "yes" three
    yes = 1 / (1 + math.exp(values[0] - values[1]))
    rows = [(0.8, 0.5, 0.5)] * 2
    below, above = (_found(*rows, thresholds=[yes + step], name="piqa") for step in (-1e-6, 1e-6))
    assert _of(below, "threshold").mean_heads == 1
    assert _of(above, "threshold").mean_heads == 3


def test_the_temperature_makes_an_exit_as_sure_as_it_is_right():
    # Of two choices that differ by 6 nats, the likelier one is right 3 times in 4.
    answers = [Answer((0.0, 6.0), 1, right) for right in (1, 1, 1, 0)]
    temperature = temperature_of(answers)
    assert temperature == pytest.approx(6 / math.log(3))
    assert answers[0].confidence(temperature) == pytest.approx(0.75)
    wrong = [Answer((0.0, 6.0), 1, right) for right in (1, 0, 0, 0)]
    assert wrong[0].confidence(temperature_of(wrong)) == pytest.approx(0.5, abs=1e-3)  # no better than a guess
    always = [Answer((0.0, 0.01), 1, 1)] * 3
    assert always[0].confidence(temperature_of(always)) == pytest.approx(1.0)


@pytest.mark.usefixtures("taken_as_they_are")
def test_a_threshold_is_chosen_on_one_half_and_judged_on_the_other():
    # At exit 2 the odd kind is surely wrong; whoever chooses on all rows sees that 0.95 loses nothing.
    rows = [(0.97, 0.5, 0.9)] * 20 + [(0.08, 0.5, 0.9)] * 20
    held_out = _of(_found(*rows, thresholds=[0.5, 0.95]), "held_out")
    assert (held_out.score, held_out.num_examples) == (1.0, 40)
    assert held_out.mean_blocks == (20 * 3 + 20 * 7) / 40
    never = _found(*[(0.001, 0.5, 0.9)] * 8, thresholds=[0.5, 0.95])  # no threshold is good: the full model answers
    assert (_of(never, "held_out").score, _of(never, "held_out").mean_blocks) == (1.0, 7)
    # Of two rows each is its own half: what is chosen on one is wrong for the other, and the score says so.
    unlucky = _of(_found((0.9, 0.5, 0.9), (0.1, 0.5, 0.9), thresholds=[0.5]), "held_out")
    assert unlucky.score == 0.5


def test_temperatures_are_those_of_the_other_half():
    # The first row's exit 2 is right, so with its temperature the second row leaves there, and is wrong.
    right, wrong = (0.9, 0.5, 0.9), (0.1, 0.5, 0.9)
    threshold = _of(_found(right, wrong, thresholds=[0.9]), "threshold")
    assert threshold.score == 0.5
    assert threshold.mean_blocks == (7 + 3) / 2  # and with the second row's, the first one does not
    alone = _found(right, thresholds=[0.9])
    assert [each.way for each in alone] == ["exit"] * 3


@pytest.mark.usefixtures("taken_as_they_are")
def test_table_and_figure_show_every_way():
    found = _found(*ROWS, thresholds=[0.65]) + _found(*ROWS, thresholds=[0.65], name="piqa")
    table = confident_exits_table(found, title="t")
    assert table.title == "t: answers at the first exit that is sure enough (lossy)"
    assert table.rows[3] == ("boolq (acc, n = 4)", "surer than 0.65", "25.0 (5..70)", "50.0", "4.0", "1.5")
    assert [row[1] for row in table.rows[:5]] == [
        "all at exit 2", "all at exit 4", "all at exit 6", "surer than 0.65", "threshold chosen on the other half",
    ]  # fmt: skip
    boolq, piqa = confident_exits_figure(found, title="t").axes
    assert [list(line.get_xdata()) for line in boolq.lines][:2] == [[3, 4, 6], [4.0]]
    assert [text.get_text() for text in boolq.texts] == ["0.65"]
    assert piqa.get_title() == "piqa, n = 4"
    (flat,) = confident_exits_figure(_found((0.9, 0.9, 0.9), (0.9, 0.9, 0.9), thresholds=[0.1, 0.2]), title="t").axes
    assert [text.get_text() for text in flat.texts] == ["0.1"]  # and no other at the same point


@pytest.mark.parametrize("thresholds", [[], [1.0], [-0.1, 0.5], [float("nan")]])
def test_thresholds_are_probabilities(thresholds):
    with pytest.raises(ConfigError, match=r"exit_thresholds: got .* allowed one or several of \[0, 1\)"):
        check_thresholds(thresholds)
    assert check_thresholds([0.9, 0.5, 0.9]) == [0.5, 0.9]
