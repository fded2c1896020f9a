import pytest

from app.benchmark.alternation import RoundCounts
from app.tuning.layer_agreement import LayerAgreement
from app.tuning.speedup_prediction import choose_diverse, needed_agreement, predict
from tests.unit.tuning.made_up import COSTS, make_prediction


def test_a_prediction_is_tokens_per_round_over_the_cost_of_a_mean_round() -> None:
    matches = [True, False, True, True, False, True, True]  # by two drafts: 1 of 2, 2 of 2, then 1 of 1 that still fits
    agreement = LayerAgreement(
        num_layers=4,
        outputs=[list(range(8))],
        budgets=[8],
        matches={exit_layer: [matches] for exit_layer in (1, 2, 3, 4)},
    )
    assert agreement.count_rounds(3, 2) == RoundCounts(decoded=7, rounds=3, drafted=5, accepted=4)
    found = predict(agreement, COSTS, max_draft_tokens=2)
    assert [(p.exit_layer, p.num_draft_tokens) for p in found] == [(e, d) for e in (1, 2, 3) for d in (1, 2)]
    last = found[-1]
    round_cost = 5 / 3 * (3 + 1.5) + 3 + (1 + 2) * (1 + 0.25 + 0.05 * 5 / 3) + 0.5
    assert last.speedup == pytest.approx((7 / 3) * (4 + 2) / round_cost)
    assert last.mean_tokens_per_round == pytest.approx(7 / 3)
    assert last.acceptance_rate == pytest.approx(4 / 5)


def test_neighbours_of_a_better_setting_are_chosen_last_and_hopeless_ones_never() -> None:
    predictions = [
        make_prediction(3, 4, 2.0),
        make_prediction(3, 5, 1.99),
        make_prediction(4, 6, 1.98),
        make_prediction(3, 7, 1.9),
        make_prediction(5, 4, 1.8),
        make_prediction(9, 9, 1.5),  # below 0.8 of the best
    ]

    def chosen(count: int) -> list[tuple[int, int]]:
        return [(p.exit_layer, p.num_draft_tokens) for p in choose_diverse(predictions, count, num_layers=12)]

    assert chosen(1) == [(3, 4)]
    assert chosen(3) == [(3, 4), (3, 7), (5, 4)]
    assert chosen(4) == [(3, 4), (3, 5), (3, 7), (5, 4)]
    assert chosen(10) == [(3, 4), (3, 5), (4, 6), (3, 7), (5, 4)]


def test_in_a_deep_model_exits_further_apart_count_as_neighbours() -> None:
    predictions = [make_prediction(8, 3, 2.0), make_prediction(10, 3, 1.9), make_prediction(12, 3, 1.8)]
    assert [p.exit_layer for p in choose_diverse(predictions, 2, num_layers=36)] == [8, 12]
    assert [p.exit_layer for p in choose_diverse(predictions, 2, num_layers=12)] == [8, 10]


def test_the_needed_agreement_is_where_one_draft_a_round_breaks_even() -> None:
    model = COSTS.cost_model(num_layers=12, exit_layer=3)
    acceptance = needed_agreement(model)
    assert 0.0 < acceptance < 1.0
    assert model.speedup(1 + acceptance, 1) == pytest.approx(1.0)
