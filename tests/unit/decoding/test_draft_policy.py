"""How many tokens to draft, and when to give up: by hand-worked rounds and fake times."""

from itertools import pairwise
from typing import ClassVar, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.decoding.cost_model import CostModel
from app.decoding.draft_policy import POLICIES, AdaptivePolicy, DraftPolicy, Pace
from app.decoding.sampling import SamplingSettings, probabilities
from app.decoding.settings import DRAFT_POLICY_NAMES, DecodingSettings, DraftPolicyName
from tests.support.decoding import decode
from tests.support.fake_decoder import FakeDecoder

# Break-even at speedup s: s * (2 + 0.1 * 8) / 10 = 0.28 s. A round of d drafts costs 2 d + 2 + 8 (1 + 0.1 d).
_COSTS = CostModel(plain_step=10.0, draft_step=2.0, draft_tail=2.0, verify=8.0, extra_token=0.1)


def _draft(policy: DraftPolicy, confidences: list[float]) -> int:
    """Drafts of one round, which have these confidences until the policy stops."""
    limit, drafted = policy.limit(), 0
    while drafted < limit:
        drafted += 1
        if drafted == limit or not policy.goes_on(confidences[drafted - 1]):
            break
    return drafted


def test_every_name_has_a_policy() -> None:
    assert set(POLICIES) == set(DRAFT_POLICY_NAMES) == set(get_args(DraftPolicyName))


def test_fixed_drafts_its_number_and_off_none_whatever_happens() -> None:
    for name, expected in (("fixed", 3), ("off", 0)):
        policy = POLICIES[name](3, _COSTS)  # type: ignore[index]
        for _ in range(20):
            assert _draft(policy, [0.0] * 3) == expected
            policy.observe(drafted=expected, accepted=0)


@pytest.mark.parametrize(
    ("confidences", "expected"),
    [
        ([0.55] * 9, 3),  # the bin's centre is 0.55: 0.55, 0.30, 0.17 < 0.28
        ([0.25] * 9, 1),  # the first is drafted without asking
        ([0.99] * 9, 9),  # 0.95^8 = 0.66: the limit ends it
        ([1.0] * 9, 9),  # the last bin holds 1, too
        ([0.95, 0.05, 0.95], 2),
        ([0.35, 0.85, 0.85], 3),  # 0.35, 0.2975, 0.25
    ],
)
def test_adaptive_stops_where_the_product_falls_below_break_even(confidences: list[float], expected: int) -> None:
    assert _draft(AdaptivePolicy(9, _COSTS), confidences) == expected


def test_break_even_rises_with_the_speedup_of_the_latest_rounds() -> None:
    policy = AdaptivePolicy(3, _COSTS)
    assert _draft(policy, [0.75] * 3) == 3  # 0.75, 0.5625 >= 0.28
    policy.observe(drafted=3, accepted=3)
    # Bin 7 saw two verified drafts accepted (the third was not asked about): (0.75 * 4 + 2) / 6 = 0.833; squared 0.694.
    # Speedup 4 * 10 / (6 + 2 + 8 * 1.3) = 2.174, break-even 0.609.
    assert _draft(policy, [0.75] * 3) == 3
    # Bin 6 is as it was: 0.65 >= 0.609, 0.42 < 0.609.
    assert _draft(policy, [0.65] * 3) == 2
    policy.observe(drafted=2, accepted=0)
    # Mean 2.5 drafted, 2.5 settled: 25 / (5 + 2 + 8 * 1.25) = 1.4706, break-even 0.4118; bin 6: 2.6 / 5 = 0.52.
    assert _draft(policy, [0.65, 0.75, 0.75]) == 3  # 0.52, 0.433
    assert _draft(policy, [0.65, 0.65, 0.75]) == 2  # 0.52, 0.2704


def test_the_speedup_counts_the_token_that_the_full_model_adds() -> None:
    policy = AdaptivePolicy(3, _COSTS)
    _draft(policy, [0.75] * 3)
    policy.observe(drafted=3, accepted=3)
    # 0.833 * 0.65 = 0.542: below the break-even of four tokens a round, 0.609, but not below that of three, 0.457.
    assert _draft(policy, [0.75, 0.65, 0.99]) == 2


def test_break_even_never_falls_below_that_of_plain_decoding() -> None:
    policy = AdaptivePolicy(4, _COSTS)
    for _ in range(30):
        policy.limit()
        policy.observe(drafted=4, accepted=0)  # a speedup of 0.47 would have 0.13
    assert _draft(policy, [0.25, 0.95, 0.95]) == 1


def test_only_the_latest_rounds_count() -> None:
    policy = AdaptivePolicy(4, _COSTS)
    for accepted in [4] * 50 + [0] * 16:
        policy.limit()  # nothing was asked, so nothing but the rounds is remembered
        policy.observe(drafted=4, accepted=accepted)
    assert _draft(policy, [0.55] * 4) == 3


def test_it_learns_from_verified_tokens_alone() -> None:
    policy = AdaptivePolicy(9, _COSTS)
    for _ in range(40):  # the first is kept, the second rejected: what follows was not verified
        assert _draft(policy, [0.95, 0.85, 0.75, 0.05])
        policy.observe(drafted=4, accepted=1)
    shares = [accepted / verified for accepted, verified in zip(policy._accepted, policy._verified, strict=True)]
    assert shares[9] == pytest.approx((4 * 0.95 + 40) / 44)
    assert shares[8] == pytest.approx(4 * 0.85 / 44)
    assert shares[7] == pytest.approx(0.75)
    assert shares[0] == pytest.approx(0.05)


def test_it_learns_that_confidence_means_nothing_or_everything() -> None:
    vain, modest = AdaptivePolicy(4, _COSTS), AdaptivePolicy(4, _COSTS)
    assert (_draft(vain, [0.95] * 4), _draft(modest, [0.15] * 4)) == (4, 1)
    for _ in range(40):
        _draft(vain, [0.95] * 4)
        vain.observe(drafted=4, accepted=0)
        _draft(modest, [0.15] * 4)
        modest.observe(drafted=1, accepted=1)
    assert (_draft(vain, [0.95] * 4), _draft(modest, [0.15] * 4)) == (1, 4)


def test_a_plain_round_in_between_teaches_nothing() -> None:
    policy = AdaptivePolicy(4, _COSTS)
    policy.observe(drafted=4, accepted=4)
    _draft(policy, [0.95] * 4)
    before = [*policy._accepted], [*policy._verified], policy._speedup()
    policy.observe(drafted=0, accepted=0)
    assert ([*policy._accepted], [*policy._verified], policy._speedup()) == before


class _Asked(AdaptivePolicy):
    """Notes with which confidence it was asked."""

    confidences: ClassVar[list[float]] = []

    def goes_on(self, confidence: float) -> bool:
        self.confidences.append(confidence)
        return True


@pytest.mark.parametrize("sampling", [SamplingSettings(), SamplingSettings(temperature=0.8, top_k=3)])
def test_the_engine_asks_with_the_probability_that_each_draft_was_chosen_with(
    sampling: SamplingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "adaptive", _Asked)
    monkeypatch.setattr(_Asked, "confidences", [])
    full, other = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0))
    exits = 0.5 * (full + other)
    chosen = DecodingSettings(
        max_new_tokens=20, exit_layer=1, num_draft_tokens=3, draft_policy="adaptive", sampling=sampling
    )
    result = decode(
        FakeDecoder(full, exits),
        [0],
        strategy="self_speculative",
        settings=chosen,
        generator=torch.Generator().manual_seed(0),
    )
    distributions = exits.softmax(-1) if sampling.greedy else probabilities(exits, settings=sampling)
    expected, last = [], result.tokens[0]
    assert 0 < result.accepted < result.drafted
    for step in result.steps:
        drafts = [last, *step.tokens[: step.accepted], *step.rejected]
        # Not asked after the last one that is allowed.
        expected += [float(distributions[before, draft]) for before, draft in pairwise(drafts[: step.drafted])]
        last = step.tokens[-1]
    assert _Asked.confidences == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) > (1 if sampling.greedy else 5)  # greedy output goes in circles


def _may_draft(pace: Pace) -> bool:
    return not pace.gave_up and not pace.wants_plain_round()


def _pace(*, by_clock: bool = True) -> Pace:
    return Pace(_COSTS, by_clock=by_clock)


def _rounds(pace: Pace, number: int, *, settled: float, draft: float, verify: float, plain: float) -> list[bool]:
    """Rounds of four drafts or, where it asks for them, plain ones; whether each drafted."""
    drafted = []
    for _ in range(number):
        drafted.append(_may_draft(pace))
        if drafted[-1]:
            pace.observe(drafted=4, settled=settled, draft_seconds=draft, verify_seconds=verify)
        else:
            pace.observe(drafted=0, settled=1, draft_seconds=0.0, verify_seconds=plain)
    return drafted


def test_drafting_that_clearly_pays_is_interrupted_once_in_64_rounds_to_time_a_plain_one() -> None:
    pace = _pace()  # measured 5 * 0.9 / 2 = 2.25
    drafted = _rounds(pace, 130, settled=5, draft=1.0, verify=1.0, plain=0.9)
    assert [number for number, drafts in enumerate(drafted) if not drafts] == [8, 73]
    assert not pace.gave_up


def test_suspicion_times_three_plain_rounds_after_eight_and_goes_on_where_drafting_pays() -> None:
    pace = _pace()  # measured 5 * 0.9 / 4 = 1.125 < 1.3
    assert _rounds(pace, 72, settled=5, draft=3.0, verify=1.0, plain=0.9) == [True] * 8 + [False] * 3 + [True] * 61
    assert not pace.gave_up


def test_steps_that_get_dearer_with_the_context_are_not_held_against_drafting() -> None:
    pace = _pace()  # at every moment 1.5 times as fast as plain steps
    for number in range(1000):
        slow = 1.0 + number / 100
        _rounds(pace, 1, settled=3, draft=1.0 * slow, verify=1.0 * slow, plain=1.0 * slow)
    assert not pace.gave_up


def test_drafting_is_given_up_when_plain_steps_get_cheaper() -> None:
    pace = _pace()
    assert all(_rounds(pace, 8, settled=3, draft=1.0, verify=1.0, plain=1.2))
    _rounds(pace, 10, settled=3, draft=1.0, verify=1.0, plain=1.2)  # 1.8 times as fast
    _rounds(pace, 100, settled=3, draft=1.0, verify=1.0, plain=0.4)  # a batch has emptied: 0.6
    assert pace.gave_up


def test_drafting_that_measures_slower_is_given_up_for_good() -> None:
    pace = _pace()  # measured 5 * 0.7 / 4 = 0.875
    assert _rounds(pace, 50, settled=5, draft=3.0, verify=1.0, plain=0.7) == [True] * 8 + [False] * 42
    assert pace.gave_up
    pace.observe(drafted=0, settled=1, draft_seconds=0.0, verify_seconds=100.0)  # plain steps that are slow later
    assert pace.gave_up


def test_drafting_whose_bound_is_below_one_is_given_up_without_a_plain_round() -> None:
    pace = _pace()  # bound 2 * 1 / 4 = 0.5
    for _ in range(7):
        assert _may_draft(pace)
        pace.observe(drafted=4, settled=2, draft_seconds=3.0, verify_seconds=1.0)
    assert not pace.gave_up
    pace.observe(drafted=4, settled=2, draft_seconds=3.0, verify_seconds=1.0)
    assert pace.gave_up


def test_one_slow_plain_round_does_not_decide() -> None:
    pace = _pace()
    _rounds(pace, 8, settled=5, draft=3.0, verify=1.0, plain=0.0)
    for seconds in (0.7, 50.0, 0.7):  # the median counts
        pace.observe(drafted=0, settled=1, draft_seconds=0.0, verify_seconds=seconds)
    assert pace.gave_up


def test_one_fast_plain_round_does_not_decide() -> None:
    pace = _pace()
    _rounds(pace, 8, settled=5, draft=3.0, verify=1.0, plain=0.0)
    for seconds in (0.1, 0.9, 0.9):  # after the first alone drafting looks eight times slower
        assert not _may_draft(pace)
        pace.observe(drafted=0, settled=1, draft_seconds=0.0, verify_seconds=seconds)
    assert not pace.gave_up


def test_one_round_that_the_machine_interrupted_says_nothing() -> None:
    pace = _pace()
    _rounds(pace, 12, settled=5, draft=1.0, verify=1.0, plain=0.9)
    _rounds(pace, 1, settled=5, draft=100.0, verify=1.0, plain=0.9)
    assert all(_rounds(pace, 30, settled=5, draft=1.0, verify=1.0, plain=0.9))


@pytest.mark.parametrize("slow", [{"draft": 100.0, "verify": 1e-3}, {"draft": 1.0, "verify": 100.0}])
def test_rounds_that_were_interrupted_in_drafting_and_in_verifying_are_left_out_alike(slow: dict[str, float]) -> None:
    pace = _pace()
    _rounds(pace, 2, settled=5, **slow, plain=0.9)
    assert all(_rounds(pace, 6, settled=5, draft=1.0, verify=1.0, plain=0.9))
    _rounds(pace, 3, settled=5, draft=1.0, verify=1.0, plain=0.9)
    assert not pace.gave_up


def test_only_the_latest_rounds_decide() -> None:
    pace = _pace()
    _rounds(pace, 200, settled=5, draft=1.0, verify=1.0, plain=0.5)
    drafted = _rounds(pace, 60, settled=1, draft=1.0, verify=1.0, plain=0.9)  # the text has become hard
    assert drafted.count(True) <= 16
    assert pace.gave_up


def test_drafting_that_measures_slower_is_given_up_also_where_verifying_takes_many_plain_steps() -> None:
    pace = _pace()  # 2.4 tokens in 0.138 s, plainly in 0.077 s
    _rounds(pace, 100, settled=2.4, draft=0.056, verify=0.082, plain=0.032)
    assert pace.gave_up


_TIMES = st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1), st.floats(0, 1)), min_size=10, max_size=40)


@settings(max_examples=100)
@given(rounds=_TIMES, plain=st.floats(0.01, 10))
def test_nothing_is_given_up_that_is_faster_in_every_round(
    rounds: list[tuple[int, float, float]], plain: float
) -> None:
    pace = _pace()
    for settled, slowness, verifying in rounds:
        seconds = plain * (1 + 0.99 * slowness * (settled - 1))  # at most what plain steps would take
        verify = plain + verifying * (seconds - plain)
        _rounds(pace, 1, settled=settled, draft=seconds - verify, verify=verify, plain=plain)
    assert not pace.gave_up


@settings(max_examples=100)
@given(rounds=_TIMES, plain=st.floats(0.01, 10))
def test_everything_is_given_up_that_is_slower_in_every_round(
    rounds: list[tuple[int, float, float]], plain: float
) -> None:
    pace = _pace()
    for settled, slowness, verifying in [*rounds, *rounds]:  # eight to judge, and three plain ones
        seconds = plain * settled * (1.01 + slowness)
        verify = plain + verifying * (seconds - plain)
        _rounds(pace, 1, settled=settled, draft=seconds - verify, verify=verify, plain=plain)
    assert pace.gave_up


@pytest.mark.parametrize(
    ("times", "pays"),  # (tokens, seconds) of rounds in turn; a plain step takes 1 s
    [(((1, 1.0), (9, 7.0), (9, 7.0)), True), (((1, 1.5), (1, 1.5), (4, 7.0)), False)],
)
def test_rounds_of_different_lengths_are_weighed_by_what_they_took(
    times: tuple[tuple[int, float], ...], pays: bool
) -> None:
    pace = _pace()
    for settled, seconds in times * 20:
        _rounds(pace, 1, settled=settled, draft=seconds - 1.0, verify=1.0, plain=1.0)
    assert pace.gave_up != pays


def test_when_sampling_the_cost_model_decides_and_no_plain_round_is_asked_for() -> None:
    slow, fast = _pace(by_clock=False), _pace(by_clock=False)
    # A round of 4 costs 8 + 2 + 8 * 1.4 = 21.2: two tokens are worth 20, three 30.
    hostile = {"draft": 1e9, "verify": 1e-9, "plain": 1e-9}
    assert _rounds(slow, 20, settled=2, **hostile) == [True] * 8 + [False] * 12
    assert all(_rounds(fast, 20, settled=3, **hostile))
    assert (slow.gave_up, fast.gave_up) == (True, False)


@pytest.mark.parametrize(("rounds", "pays"), [(((8, 3), (1, 2)), True), (((1, 1), (8, 3)), False)])
def test_when_sampling_rounds_count_by_their_mean(rounds: tuple[tuple[int, int], ...], pays: bool) -> None:
    pace = _pace(by_clock=False)  # 4.5 drafts on average cost 9 + 2 + 8 * 1.45 = 22.6: 2.5 tokens are worth 25, two 20
    for drafted, settled in rounds * 20:
        pace.observe(drafted=drafted, settled=settled, draft_seconds=1.0, verify_seconds=1.0)
    assert pace.gave_up != pays
