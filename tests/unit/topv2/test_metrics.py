import pytest
import torch

from app.errors import DataError
from app.topv2.metrics import ParseExactMatch, ParseScore
from app.topv2.semantic_parse import TARGET_FORMATS, TargetFormat

RIGHT = "[IN:A say [SL:B c d ] ]"
ANSWERS = {  # answer -> exact, frame, well-formed
    RIGHT: (True, True, True),
    "[IN:A   say [SL:B c d]]\n": (True, True, True),
    "[IN:A please say [SL:B c d ] ]": (False, True, True),
    "[IN:A say [SL:B c ] ]": (False, False, True),
    "[IN:A say [SL:B c d ]": (False, False, False),
    "[IN:A say [SL:B c d ] ] ]": (False, False, False),
    "": (False, False, False),
}


def _metric(*groups: str, target_format: TargetFormat = "parse") -> ParseExactMatch:
    return ParseExactMatch(groups or ("alarm",), target_format=target_format)


@pytest.mark.parametrize(("answer", "hits"), ANSWERS.items())
def test_an_answer_is_right_or_wrong(answer: str, hits: tuple[bool, ...]) -> None:
    metric = _metric()
    metric.update([answer], [RIGHT], ["alarm"])
    scores = metric.compute()
    assert scores is not None
    assert scores.overall == ParseScore(*map(float, hits), num_examples=1)  # one character off is 0, not 0.96


def test_shares_are_of_all_answers_and_of_each_groups() -> None:
    metric = _metric("weather", "alarm", "timer", "alarm")
    metric.update(list(ANSWERS), [RIGHT] * 7, ["alarm"] * 3 + ["weather"] * 4)
    scores = metric.compute()
    assert scores is not None
    assert scores.overall == ParseScore(2 / 7, 3 / 7, 4 / 7, 7)
    assert scores.by_group == {"alarm": ParseScore(2 / 3, 1.0, 1.0, 3), "weather": ParseScore(0.0, 0.0, 1 / 4, 4)}


def test_batches_and_ranks_add_up() -> None:
    whole, parts = _metric(), [_metric(), _metric()]
    for index, answer in enumerate(ANSWERS):
        for metric in (whole, parts[index % 2]):
            metric.update([answer], [RIGHT], ["alarm"])
    assert torch.equal(parts[0].counts_G4 + parts[1].counts_G4, whole.counts_G4)
    assert not torch.equal(parts[0].counts_G4, whole.counts_G4)


def test_json_answers_are_scored_as_the_trees_they_stand_for() -> None:
    encode = TARGET_FORMATS["json"].encode
    metric = _metric(target_format="json")
    answers = [encode(RIGHT), encode(RIGHT).replace('":', '" : '), encode("[IN:A say [SL:B c ] ]"), RIGHT]
    metric.update(answers, [encode(RIGHT)] * 4, ["alarm"] * 4)
    scores = metric.compute()
    assert scores is not None
    assert scores.overall == ParseScore(2 / 4, 2 / 4, 3 / 4, 4)


def test_nothing_was_scored_where_there_are_no_answers() -> None:
    metric = _metric()
    metric.update([], [], [])
    assert metric.compute() is None


def test_a_reference_that_is_no_parse_is_an_error_and_not_a_wrong_answer() -> None:
    with pytest.raises(DataError, match=r"reference '\[IN:A' of alarm: at the end: no \] for IN:A"):
        _metric().update(["[IN:A"], ["[IN:A"], ["alarm"])
