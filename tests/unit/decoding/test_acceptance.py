"""The sampling rule is proven by enumerating everything that can happen, not by sampling it."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from app.decoding.acceptance import accept_greedy, accept_sampled

_VOCAB = 4
_Distributions = Callable[[tuple[int, ...]], Tensor]  # what was said so far -> distribution of the next token [V]


def _random_distributions(seed: int, *, share_of_zeros: float = 0.0) -> _Distributions:
    def distribution(prefix: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 10_007 + sum((t + 1) * 5**i for i, t in enumerate(prefix)))
        weights = torch.rand(_VOCAB, generator=generator, dtype=torch.float64)
        weights[torch.rand(_VOCAB, generator=generator) < share_of_zeros] = 0.0
        weights[0 if weights.sum() == 0 else slice(0, 0)] = 1.0
        return weights / weights.sum()

    return distribution


def _always(*distribution: float) -> _Distributions:
    return lambda prefix: torch.tensor(distribution, dtype=torch.float64)


def _probs_of_sequences(distributions: _Distributions, length: int) -> dict[tuple[int, ...], float]:
    """Probability of every sequence when each token is drawn from `distributions`."""
    out = {(): 1.0}
    for _ in range(length):
        out = {(*seq, t): p * float(distributions(seq)[t]) for seq, p in out.items() for t in range(_VOCAB)}
    return out


def _probs_of_a_round(
    rule: Callable[..., tuple[Tensor, Tensor]], draft: _Distributions, target: _Distributions, num_drafts: int
):  # type: ignore[no-untyped-def]
    """Probability of every sequence of num_drafts + 1 tokens that begins with one round of `rule`.

    Enumerates each drafted sequence and each side that a uniform can fall on of its threshold min(1, target/draft);
    rounds that settle fewer tokens are continued with the target's own distributions.
    """
    total = dict.fromkeys(itertools.product(range(_VOCAB), repeat=num_drafts + 1), 0.0)
    for drafts, p_drafts in _probs_of_sequences(draft, num_drafts).items():
        if p_drafts == 0.0:
            continue
        prefixes = [drafts[:i] for i in range(num_drafts + 1)]
        draft_probs = torch.stack([draft(prefix) for prefix in prefixes[:-1]])
        target_probs = torch.stack([target(prefix) for prefix in prefixes])
        thresholds = [min(1.0, float(target_probs[i, t] / draft_probs[i, t])) for i, t in enumerate(drafts)]
        for sides in itertools.product((True, False), repeat=num_drafts):
            p_sides = 1.0
            for below, a in zip(sides, thresholds, strict=True):
                p_sides *= a if below else 1.0 - a
            if p_sides == 0.0:
                continue
            uniforms = [a / 2 if below else (1 + a) / 2 for below, a in zip(sides, thresholds, strict=True)]
            accepted, distribution = rule(
                torch.tensor(drafts),
                draft_probs_TV=draft_probs,
                target_probs_SV=target_probs,
                uniforms_T=torch.tensor(uniforms, dtype=torch.float64),
            )
            for token in range(_VOCAB):
                settled = (*drafts[: int(accepted)], token)
                rest = _probs_of_sequences(lambda tail, s=settled: target((*s, *tail)), num_drafts + 1 - len(settled))
                for tail, p_tail in rest.items():
                    total[(*settled, *tail)] += p_drafts * p_sides * float(distribution[token]) * p_tail
    return total


def _error(
    rule: Callable[..., tuple[Tensor, Tensor]], draft: _Distributions, target: _Distributions, num_drafts: int
) -> float:
    exact = _probs_of_sequences(target, num_drafts + 1)
    return max(abs(p - exact[seq]) for seq, p in _probs_of_a_round(rule, draft, target, num_drafts).items())


_PAIRS = {
    "random": (_random_distributions(1), _random_distributions(2)),
    "with zeros in both": (_random_distributions(3, share_of_zeros=0.4), _random_distributions(4, share_of_zeros=0.4)),
    "equal": (_random_distributions(5), _random_distributions(5)),
    "certain draft": (_always(0, 1, 0, 0), _random_distributions(6)),
    "certain target": (_random_distributions(7), _always(0, 0, 1, 0)),
    "certain and different": (_always(1, 0, 0, 0), _always(0, 0, 0, 1)),
    "certain and equal": (_always(0, 1, 0, 0), _always(0, 1, 0, 0)),
}


@pytest.mark.parametrize("num_drafts", [1, 2])
@pytest.mark.parametrize("pair", _PAIRS)
def test_the_distribution_of_the_output_is_the_targets_by_exact_enumeration(pair: str, num_drafts: int) -> None:
    assert _error(accept_sampled, *_PAIRS[pair], num_drafts) < 1e-12


def _certain(drafts_T: Tensor, *, draft_probs_TV: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
    assert set(draft_probs_TV.flatten().tolist()) == {0.0, 1.0}
    return accept_sampled(drafts_T, draft_probs_TV=None, **given)


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
@pytest.mark.parametrize("target", [target for _, target in _PAIRS.values()], ids=_PAIRS)
def test_drafts_that_are_certain_need_no_distributions_by_exact_enumeration(
    target: _Distributions, num_drafts: int
) -> None:
    def draft(prefix: tuple[int, ...]) -> Tensor:  # as an n-gram says one thing or another, given what came before
        return torch.eye(_VOCAB, dtype=torch.float64)[(1 + sum(prefix)) % _VOCAB]

    assert _error(_certain, draft, target, num_drafts) < 1e-12


def _draws_again_from_the_target(drafts_T: Tensor, **distributions: Tensor) -> tuple[Tensor, Tensor]:
    accepted, _ = accept_sampled(drafts_T, **distributions)
    return accepted, distributions["target_probs_SV"][accepted]


def _keeps_every_draft(drafts_T: Tensor, **distributions: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tensor(len(drafts_T)), distributions["target_probs_SV"][-1]


@pytest.mark.parametrize("wrong_rule", [_draws_again_from_the_target, _keeps_every_draft])
def test_the_enumeration_notices_a_wrong_rule(wrong_rule: Callable[..., tuple[Tensor, Tensor]]) -> None:
    assert _error(wrong_rule, *_PAIRS["random"], 2) > 1e-2


def test_a_rejection_by_rounding_alone_draws_from_the_target() -> None:
    distribution = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    accepted, following = accept_sampled(
        torch.tensor([0]),
        draft_probs_TV=distribution,
        target_probs_SV=distribution.repeat(2, 1),
        uniforms_T=torch.tensor([1.0]),
    )
    assert int(accepted) == 0
    assert torch.equal(following, distribution[0])


def _accept(drafts: list[int], draft: list[float], target: list[float], uniform: float) -> tuple[int, list[float]]:
    given = {
        "target_probs_SV": torch.tensor([target] * (len(drafts) + 1)),
        "uniforms_T": torch.full((len(drafts),), uniform),
    }
    drafts_T, draft_probs_TV = torch.tensor(drafts, dtype=torch.long), torch.tensor([draft] * len(drafts))
    accepted, distribution = accept_sampled(drafts_T, draft_probs_TV=draft_probs_TV.view(-1, _VOCAB), **given)
    if not drafts or max(draft) == 1:  # certain drafts: their distributions may be left out
        again, likewise = accept_sampled(drafts_T, draft_probs_TV=None, **given)
        assert (int(again), likewise.tolist()) == (int(accepted), distribution.tolist())
    return int(accepted), distribution.tolist()


_ALMOST_ONE = 1.0 - 2.0**-24  # the largest float32 that torch.rand gives


@pytest.mark.parametrize(
    ("drafts", "draft", "target", "uniform", "expected"),
    [
        ([], [0.0] * 4, [0.1, 0.2, 0.3, 0.4], 0.0, (0, [0.1, 0.2, 0.3, 0.4])),  # nothing drafted: a plain step
        ([1, 1], [0, 1, 0, 0], [0, 1, 0, 0], _ALMOST_ONE, (2, [0, 1, 0, 0])),  # certain and right
        ([1, 1], [0, 1, 0, 0], [0, 0, 0, 1], 0.0, (0, [0, 0, 0, 1])),  # certain and impossible, even where u is 0
        ([1], [0, 1, 0, 0], [0.25] * 4, 0.5, (0, [1 / 3, 0, 1 / 3, 1 / 3])),
        ([1], [0, 1, 0, 0], [0.25] * 4, 0.125, (1, [0.25] * 4)),
        ([2], [0.25] * 4, [0.25] * 4, _ALMOST_ONE, (1, [0.25] * 4)),  # equal: always kept
        ([0], [0.5, 0.5, 0, 0], [0.25, 0.75, 0, 0], 0.75, (0, [0, 1, 0, 0])),
        ([3], [0.5, 0, 0, 0.5], [0.5, 0.5, 0, 0], 0.0, (0, [0, 1, 0, 0])),  # outside of the target's support
    ],
)
def test_cases_by_hand(
    drafts: list[int], draft: list[float], target: list[float], uniform: float, expected: tuple[int, list[float]]
) -> None:
    accepted, distribution = _accept(drafts, draft, target, uniform)
    assert accepted == expected[0]
    assert distribution == pytest.approx(expected[1])


def test_a_residual_that_is_next_to_nothing_is_still_a_distribution() -> None:
    _, distribution = _accept([0], [0.5, 0.5 - 1e-7, 0, 0], [0.5 - 1e-7, 0.5, 0, 0], _ALMOST_ONE)
    assert distribution == pytest.approx([0, 1, 0, 0], abs=1e-6)
    _, distribution = _accept([0], [1.0, 0, 0, 0], [1.0 - 1e-7, 0, 1e-40, 0], _ALMOST_ONE)  # a denormal mass
    assert sum(distribution) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("drafts", "choices", "expected"),
    [
        ([], [7], (0, 7)),
        ([1, 2], [1, 2, 3], (2, 3)),
        ([1, 2], [1, 9, 3], (1, 9)),
        ([1, 2], [9, 2, 3], (0, 9)),
    ],
)
def test_greedy_acceptance_keeps_the_agreeing_prefix_and_adds_the_full_models_choice(
    drafts: list[int], choices: list[int], expected: tuple[int, int]
) -> None:
    assert accept_greedy(drafts, choices) == expected
