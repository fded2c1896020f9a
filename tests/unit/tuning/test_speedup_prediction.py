from dataclasses import replace

import pytest

from app.decoding.result import RoundCounts
from app.tuning.layer_agreement import LayerAgreement
from app.tuning.speedup_prediction import choose_diverse, needed_agreement, predict, with_policies
from tests.unit.tuning.made_up import COSTS, make_prediction


def test_a_prediction_is_tokens_per_round_over_the_cost_of_a_mean_round() -> None:
    matches = [True, False, True, True, False, True, True]  # by two drafts: 1 of 2, 2 of 2, then 1 of 1 that still fits
    agreement = LayerAgreement(
        num_layers=4,
        prompts=[[9, 9]],
        outputs=[list(range(8))],
        budgets=[8],
        matches={exit_layer: [matches] for exit_layer in (1, 2, 3, 4)},
    )
    assert agreement.count_rounds(3, 2) == RoundCounts(num_decoded=7, rounds=3, drafted=5, accepted=4)
    found = predict(agreement, COSTS, max_draft_tokens=2)
    assert [(p.exit_layer, p.num_draft_tokens) for p in found] == [(e, d) for e in (1, 2, 3) for d in (1, 2)]
    last = found[-1]
    round_cost = 5 / 3 * (3 + 1.5) + 3 + (1 + 2) * (1 + 0.25 + 0.05 * 5 / 3) + 0.5
    assert last.speedup == pytest.approx((7 / 3) * (4 + 2) / round_cost)
    assert last.mean_tokens_per_round == pytest.approx(7 / 3)
    assert last.acceptance_rate == pytest.approx(4 / 5)


def test_with_n_grams_their_rounds_are_simulated_and_cost_as_all_blocks_verify() -> None:
    output = [1, 2, 3, 1, 2, 3, 4, 9]  # after 3 1 comes 2 3 (1), after 2 3 once more 1: not kept
    matches = [False, True, False, False, False, False, False]
    agreement = LayerAgreement(
        num_layers=2, prompts=[[7]], outputs=[output], budgets=[8], matches={1: [matches], 2: [matches]}
    )
    found = agreement.found_drafts(1, most=3)
    # After the second 1 (four tokens settled) 2 3 1 is found, of which two are kept; the third 3 ends the drafts.
    assert found == [[(0, 0), (0, 0), (0, 0), (3, 2), (3, 1), (3, 0), (0, 0)]]
    counts = agreement.count_rounds(1, 2, found)
    # Rounds: 2 drafts, none kept; 2 drafts, 1 kept (3, then 1); 2 3 1 found, cut to the room of 3, 2 kept and 4; 9.
    assert counts == RoundCounts(
        num_decoded=7, rounds=4, drafted=7, accepted=3, rounds_by_n_gram=1, drafted_by_n_gram=3, accepted_by_n_gram=2
    )
    predictions = predict(agreement, COSTS, max_draft_tokens=2, n_gram_match=(1, 1, 5))
    assert [(p.exit_layer, p.num_draft_tokens, p.n_gram_match) for p in predictions] == [
        (1, 1, None), (1, 2, None), (1, 1, 1), (1, 2, 1), (None, None, 1)
    ]  # fmt: skip
    by_n_gram = (2 + 2) * (1 + 0.25 + 0.05 * 3) + 0.5
    alone = predictions[-1]
    assert alone.speedup == pytest.approx(7 * 4 / (4 * 4 + by_n_gram))
    assert (alone.acceptance_rate, alone.mean_tokens_per_round) == (pytest.approx(2 / 3), pytest.approx(7 / 5))
    lengths = predict(agreement, COSTS, max_draft_tokens=1, n_gram_match=(1,), n_gram_max_drafts=(1, 2, 3))
    beside, *by_themselves = lengths[1:]
    assert [each.n_gram_max_drafts for each in by_themselves] == [1, 2, 3]
    fastest = max(by_themselves, key=lambda each: each.speedup)
    assert (beside.exit_layer, beside.n_gram_max_drafts) == (1, fastest.n_gram_max_drafts)
    assert fastest.settings["n_gram_max_drafts"] == 2  # of which both are kept once; a third never is
    drafter = 4 / 3 * (1 + 1.5) + 1 + (1 + 2) * (1 + 0.25 + 0.05 * 4 / 3) + 0.5
    assert predictions[3].speedup == pytest.approx(7 * 4 / (3 * drafter + by_n_gram), rel=0.1)


def test_of_settings_with_n_grams_and_without_both_are_run() -> None:
    plain = [make_prediction(3, 4, 2.0), make_prediction(6, 4, 1.9)]
    both = [replace(each, n_gram_match=2, speedup=each.speedup + 0.5) for each in plain]
    alone = replace(both[0], exit_layer=None, num_draft_tokens=None, speedup=2.1)
    assert choose_diverse([*plain, *both, alone], 2, num_layers=8) == [*both, plain[0]]
    assert choose_diverse([*plain, *both, alone], 3, num_layers=8) == [*both, alone, plain[0]]
    assert choose_diverse([*plain, *both, alone], 4, num_layers=8) == [*both, alone, plain[0]]
    assert choose_diverse([*plain, replace(alone, speedup=1.7)], 1, num_layers=8) == [
        plain[0],
        replace(alone, speedup=1.7),
    ]
    assert choose_diverse([*plain, replace(alone, speedup=1.5)], 1, num_layers=8) == plain[:1]  # hopeless
    fast = replace(alone, speedup=9.0)
    assert choose_diverse([*plain, fast], 1, num_layers=8) == [fast, plain[0]]  # shows what it gains


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


def test_changing_lengths_are_run_from_the_best_exit_and_from_the_best_three() -> None:
    best = replace(make_prediction(3, 2, 1.5), draft_vocabulary_size=9)
    alike = [replace(make_prediction(e, d, s), draft_vocabulary_size=9) for e, d, s in (
        (1, 1, 1.25), (2, 1, 1.2), (2, 4, 1.4), (4, 3, 1.3), (6, 3, 1.35), (7, 3, 1.34), (12, 1, 1.1)
    )]  # fmt: skip
    predictions = [best, *alike, make_prediction(9, 3, 1.49)]  # the last has other drafts
    alone = replace(make_prediction(1, 1, 1.6), exit_layer=None, num_draft_tokens=None, n_gram_match=2)
    *chosen, adaptive, dynamic = with_policies([alone, best], predictions, longest=12)
    assert chosen == [alone, best]
    assert adaptive == replace(best, draft_policy="adaptive", num_draft_tokens=8)
    assert dynamic == replace(adaptive, draft_policy="dynamic", draft_exits=(6, 1))  # which are far apart
    near = with_policies([best], [best, *alike[1:4]], longest=12)[-1]
    assert near.draft_exits == (2, 4)  # where there are no others
    assert with_policies([alone], predictions, longest=12) == [alone]
    assert with_policies([best], [best], longest=1) == [best]
    assert [each.draft_policy for each in with_policies([best], [best], longest=2)] == ["fixed", "adaptive"]


def test_in_a_deep_model_exits_further_apart_count_as_neighbours() -> None:
    predictions = [make_prediction(8, 3, 2.0), make_prediction(10, 3, 1.9), make_prediction(12, 3, 1.8)]
    assert [p.exit_layer for p in choose_diverse(predictions, 2, num_layers=36)] == [8, 12]
    assert [p.exit_layer for p in choose_diverse(predictions, 2, num_layers=12)] == [8, 10]


def test_the_needed_agreement_is_where_one_draft_a_round_breaks_even() -> None:
    model = COSTS.cost_model(num_layers=12, exit_layer=3)
    acceptance = needed_agreement(model)
    assert 0.0 < acceptance < 1.0
    assert model.speedup(1 + acceptance, 1) == pytest.approx(1.0)
