"""The cost model against the formulas of the method, worked out by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.decoding.cost_model import CostModel, tokens_per_round


def _self_speculative(**changed: float) -> CostModel:
    chosen = {"num_layers": 10, "exit_layer": 2, "head": 1.0, "extra_token": 0.1, "overhead": 0.5} | changed
    return CostModel.self_speculative(**chosen)  # type: ignore[arg-type]


def test_tokens_per_round_by_hand() -> None:
    assert tokens_per_round(0.8, 3) == pytest.approx(1 + 0.8 + 0.64 + 0.512)
    assert tokens_per_round(0.8, 3) == pytest.approx((1 - 0.8**4) / (1 - 0.8))
    assert tokens_per_round(1.0, 4) == 5.0
    assert tokens_per_round(0.0, 4) == 1.0
    assert tokens_per_round(0.5, 0) == 1.0


def test_a_round_of_self_speculation_by_hand() -> None:
    costs = _self_speculative()
    # d (E + H) + E + (L - E + H)(1 + k d) + overhead, with d = 3
    assert costs.round_cost(3) == pytest.approx(3 * (2 + 1) + 2 + (10 - 2 + 1) * 1.3 + 0.5)
    assert costs.speedup(tokens_per_round(0.8, 3), 3) == pytest.approx(2.952 * 11 / 23.2)
    assert costs.break_even(1.5) == pytest.approx(1.5 * (3 + 0.1 * 9) / 11)


def test_a_drafts_own_head_and_the_price_of_several_positions_by_hand() -> None:
    costs = _self_speculative(draft_head=0.25, first_extra=0.2)
    # d (E + H_d) + E + (L - E + H)(1 + j + k d) + overhead, with d = 3
    assert costs.round_cost(3) == pytest.approx(3 * (2 + 0.25) + 2 + (10 - 2 + 1) * 1.5 + 0.5)
    assert costs.plain_step == 11.0
    assert costs.break_even(1.5) == pytest.approx(1.5 * (2.25 + 0.1 * 9) / 11)  # j is paid by the first draft
    anew = CostModel.two_pass(num_layers=10, head=1.0, draft_step=3.0, first_extra=0.2, extra_token=0.1, overhead=0.5)
    assert anew.round_cost(3) == pytest.approx(3 * 3.0 + 11 * 1.5 + 0.5)


def test_a_round_that_verifies_anew_by_hand() -> None:
    costs = CostModel.two_pass(num_layers=10, head=1.0, draft_step=3.0, extra_token=0.1)
    assert costs.round_cost(3) == pytest.approx(3 * 3.0 + 11 * 1.3)
    assert costs.speedup(2.952, 3) == pytest.approx(2.952 * 11 / 23.3)


def test_a_round_without_drafts_costs_what_a_plain_step_costs() -> None:
    assert _self_speculative(overhead=0.0).round_cost(0) == pytest.approx(11.0)
    assert _self_speculative(overhead=0.0).speedup(1.0, 0) == pytest.approx(1.0)
    assert CostModel.two_pass(num_layers=10, head=1.0, draft_step=3.0, extra_token=0.1).round_cost(0) == 11.0


def test_the_bound_of_the_speedup_is_plain_step_over_draft_step() -> None:
    costs = _self_speculative(extra_token=0.0, overhead=0.0)
    bound = (10 + 1) / (2 + 1)
    assert costs.speedup(tokens_per_round(1.0, 10**6), 10**6) == pytest.approx(bound, rel=1e-4)
    assert all(costs.speedup(d + 1, d) < bound for d in range(1000))


_COSTS = st.builds(
    CostModel.self_speculative,
    num_layers=st.integers(2, 40),
    exit_layer=st.just(1),
    head=st.floats(0.01, 20),
    extra_token=st.floats(0, 1),
    overhead=st.floats(0, 10),
)


@settings(max_examples=200)
@given(costs=_COSTS, settled=st.floats(1, 17), drafted=st.integers(0, 16))
def test_one_more_draft_at_break_even_leaves_the_speedup_as_it_is(
    costs: CostModel, settled: float, drafted: int
) -> None:
    before = costs.speedup(settled, drafted)
    chance = costs.break_even(before)
    assert costs.speedup(settled + chance, drafted + 1) == pytest.approx(before)
    assert costs.speedup(settled + chance * 1.01, drafted + 1) > before
    assert costs.speedup(settled + chance * 0.99, drafted + 1) < before
