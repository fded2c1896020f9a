"""Which exit drafts, by hand-worked rounds and fake times."""

import pytest

from app.decoding.cost_model import CostModel
from app.decoding.exit_choice import ExitChoice

# A round of d drafts costs 2 d + 2 + 8 (1 + 0.1 d) from exit 2, and 4 d + 4 + 6 (1 + 0.1 d) from exit 4.
_COSTS = CostModel(plain_step=10.0, draft_step=2.0, draft_tail=2.0, verify=8.0, extra_token=0.1)
_BY_EXIT = {2: _COSTS, 4: _COSTS.from_exit(later_by=2, own_by=0), 1: _COSTS.from_exit(later_by=-1, own_by=2)}


def _rounds(choice: ExitChoice, number: int, settled: dict[int, int], seconds: dict[int, float]) -> list[int]:
    """The exits of so many rounds of two drafts, whose rounds settle and take this."""
    chosen = []
    for _ in range(number):
        chosen.append(exit_layer := choice.begin_round())
        choice.observe(drafted=2, settled=settled[exit_layer], seconds=seconds[exit_layer])
    return chosen


def test_another_exit_has_the_costs_of_the_blocks_that_it_runs() -> None:
    assert [each.round_cost(2) for each in _BY_EXIT.values()] == pytest.approx([15.6, 19.2, 17.8])
    assert {each.plain_step for each in _BY_EXIT.values()} == {10.0}


def test_each_exit_is_tried_four_times_then_the_one_with_most_tokens_for_its_time() -> None:
    choice = ExitChoice(_BY_EXIT, by_clock=True)
    chosen = _rounds(choice, 200, settled={1: 2, 2: 2, 4: 3}, seconds={1: 1.0, 2: 1.0, 4: 1.2})
    assert sorted(chosen[:12]) == [1] * 4 + [2] * 4 + [4] * 4
    assert chosen[0] == 2
    assert chosen[12:].count(4) > 130
    for other in (1, 2):
        assert chosen[-100:].count(other) >= 1  # from time to time


def test_what_pays_more_later_is_noticed() -> None:
    choice = ExitChoice(_BY_EXIT, by_clock=True)
    _rounds(choice, 500, settled={1: 1, 2: 3, 4: 2}, seconds={1: 1.0, 2: 1.0, 4: 1.0})
    chosen = _rounds(choice, 500, settled={1: 1, 2: 1, 4: 2}, seconds={1: 1.0, 2: 1.0, 4: 1.0})
    assert chosen[-200:].count(4) > 150


def test_one_round_that_the_machine_interrupted_decides_nothing() -> None:
    choice = ExitChoice(_BY_EXIT, by_clock=True)
    settled, seconds = {1: 1, 2: 3, 4: 2}, {1: 1.0, 2: 1.0, 4: 1.0}
    _rounds(choice, 40, settled, seconds)
    assert choice.begin_round() == 2
    choice.observe(drafted=2, settled=3, seconds=1000.0)
    assert _rounds(choice, 20, settled, seconds).count(2) > 12


def test_without_the_clock_the_cost_model_decides() -> None:
    choice = ExitChoice(_BY_EXIT, by_clock=False)  # 3 / 15.6 < 4 / 19.2
    chosen = _rounds(choice, 200, settled={1: 1, 2: 3, 4: 4}, seconds={1: 1e-9, 2: 1.0, 4: 1e9})
    assert max(set(chosen), key=chosen.count) == 4


def test_asking_again_changes_nothing() -> None:
    choice = ExitChoice(_BY_EXIT, by_clock=True)
    for settled in (1, 2, 3, 1, 2):
        assert len({choice.begin_round() for _ in range(3)}) == 1
        choice.observe(drafted=2, settled=settled, seconds=1.0)
