"""Sampled output follows the full model's distribution: samples of the engine are counted against plain enumeration."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from app.decoding import acceptance
from app.decoding.engine import decode_batch
from app.decoding.result import DecodingResult
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings
from tests.support.decoding import decode
from tests.support.fake_decoder import FakeDecoder
from tests.support.slow_twins import probs_by_sorting, probs_of_sequences

_VOCAB, _LENGTH, _ROWS = 4, 4, 500
_FULL, _OTHER = torch.randn(2, _VOCAB, _VOCAB, generator=torch.Generator().manual_seed(3))
_EXITS = 0.5 * (_FULL + _OTHER)
_PENALTY = 1.5


def _penalise(ids_1S: Tensor, scores_1V: Tensor) -> Tensor:
    """Every occurrence of a token lowers its score: depends on the whole context."""
    return scores_1V - _PENALTY * torch.bincount(ids_1S[0], minlength=_VOCAB)


_CUTS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top-k, top-p and min-p": {"temperature": 1.3, "top_k": 3, "top_p": 0.9, "min_p": 0.2},
    "a processor of the context": {"temperature": 1.0, "min_p": 0.02, "processor": _penalise},
}
_WAYS: dict[str, dict[str, Any]] = {
    "self_speculative": {"exit_layer": 1, "num_draft_tokens": 2},
    "self_speculative, adaptive": {"exit_layer": 1, "num_draft_tokens": 3, "draft_policy": "adaptive"},
    "self_speculative, dynamic": {
        "exit_layer": 1,
        "num_draft_tokens": 3,
        "draft_policy": "dynamic",
        "draft_exits": (3,),
    },
    "self_speculative, some tokens never drafted": {"exit_layer": 1, "num_draft_tokens": 2},
    "self_speculative, static": {"exit_layer": 1, "num_draft_tokens": 2, "engine": "static"},
    "self_speculative, static, adaptive, some tokens never drafted": {
        "exit_layer": 1,
        "num_draft_tokens": 3,
        "draft_policy": "adaptive",
        "engine": "static",
    },
    "draft_model": {"num_draft_tokens": 2},
    "layer_skip": {"skipped_layers": (1,), "num_draft_tokens": 2},
    "self_speculative, n-grams": {"exit_layer": 1, "num_draft_tokens": 2, "n_gram_match": 1, "n_gram_max_drafts": 2},
    "n_gram": {"n_gram_match": 1, "n_gram_max_drafts": 2},
}


def _settings(way: str, cut: str, **changed: Any) -> DecodingSettings:
    draft = FakeDecoder(pad(_EXITS, (0, 2)), pad(_FULL, (0, 2))) if way == "draft_model" else None
    chosen = {"max_new_tokens": _LENGTH, "draft_decoder": draft, **_WAYS[way], **changed}
    return DecodingSettings(sampling=SamplingSettings(**_CUTS[cut]), **chosen)


def _samples(way: str, cut: str, number: int) -> list[DecodingResult]:
    settings, decoder = _settings(way, cut), FakeDecoder(_FULL, _EXITS)
    decoder.may_skip = way == "layer_skip"
    decoder.unspeakable = (1, 3) if "never drafted" in way else ()
    results: list[DecodingResult] = []
    for first in range(0, number, _ROWS):
        generators = [torch.Generator().manual_seed(seed) for seed in range(first, first + _ROWS)]
        strategy: Any = way.split(",")[0]
        results += decode_batch(decoder, [[0]] * _ROWS, strategy=strategy, settings=settings, generators=generators)
    return results


def _distribution(cut: str) -> Callable[[tuple[int, ...]], list[float]]:
    """The full model's distribution given everything before, in plain Python."""

    def distribution(ids: tuple[int, ...]) -> list[float]:
        logits = _FULL[ids[-1]].tolist()
        if "processor" in _CUTS[cut]:
            logits = [score - _PENALTY * ids.count(token) for token, score in enumerate(logits)]
        cuts = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0} | _CUTS[cut]
        cuts.pop("processor", None)
        return probs_by_sorting(logits, **cuts)

    return distribution


def _excess(results: list[DecodingResult], cut: str) -> float:
    """Chi-square over its 0.999 quantile; cells that expect less than 5 are one."""
    counts = Counter(tuple(result.tokens) for result in results)
    expected = probs_of_sequences(_distribution(cut), length=_LENGTH, start=(0,))
    impossible = [seq for seq in counts if expected.get(seq, 0.0) == 0.0]
    if impossible:
        return float("inf")
    large = {seq: len(results) * p for seq, p in expected.items() if len(results) * p >= 5}
    cells = [(counts[seq], mean) for seq, mean in large.items()]
    rest = len(results) - sum(large.values())
    if rest >= 5:
        cells.append((len(results) - sum(count for count, _ in cells), rest))
    freedom = len(cells) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty
    assert freedom > 15
    return sum((count - mean) ** 2 / mean for count, mean in cells) / quantile


def _check_kinds(way: str, cut: str, results: list[DecodingResult]) -> None:
    """Drafts of two were kept in part, whole and not at all, by each that drafts; what repeats itself is penalised."""
    for by_n_gram in {way == "n_gram", "gram" in way}:
        kinds = {(s.drafted, s.accepted) for result in results for s in result.steps if s.by_n_gram == by_n_gram}
        assert ({(2, 0)} if by_n_gram and "processor" in cut else {(2, 0), (2, 1), (2, 2)}) <= kinds
    first = {"n_gram": {0, 2}}.get(way, {1, 2} if "adaptive" in way or "dynamic" in way else {2})
    assert {result.steps[0].drafted for result in results} == first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "cut"),
    [(way, cut) for way in _WAYS for cut in _CUTS if "static" not in way or "processor" not in _CUTS[cut]],
)
def test_20000_samples_follow_the_full_models_distribution(way: str, cut: str) -> None:
    results = _samples(way, cut, 20_000)
    assert _excess(results, cut) < 1.0
    _check_kinds(way, cut, results)


@pytest.mark.parametrize(
    ("way", "cut"),
    [
        ("self_speculative", "a processor of the context"),
        ("self_speculative, adaptive", "temperature"),
        ("self_speculative, dynamic", "temperature"),
        ("self_speculative, some tokens never drafted", "a processor of the context"),
        ("self_speculative, some tokens never drafted", "temperature"),
        ("draft_model", "temperature"),
        ("layer_skip", "top-k, top-p and min-p"),
        ("self_speculative, static", "top-k, top-p and min-p"),
        ("self_speculative, static, adaptive, some tokens never drafted", "temperature"),
        ("self_speculative, n-grams", "a processor of the context"),
        ("n_gram", "top-k, top-p and min-p"),
    ],
)
def test_samples_follow_the_full_models_distribution_whoever_drafts(way: str, cut: str) -> None:
    results = _samples(way, cut, 2_000)
    assert _excess(results, cut) < 1.0
    _check_kinds(way, cut, results)


def _keeps_every_draft(drafts_T: Tensor, *, target_probs_SV: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tensor(len(drafts_T)), target_probs_SV[-1]


def _draws_again_from_the_target(drafts_T: Tensor, **distributions: Tensor) -> tuple[Tensor, Tensor]:
    accepted, _ = _REAL_RULE(drafts_T, **distributions)
    return accepted, distributions["target_probs_SV"][accepted]


_REAL_RULE, _REAL_PROCESS = acceptance.accept_sampled, acceptance.process


def _shows_no_drafts(logits_BSV: Tensor, rows: Any, drafts: Any, processor: Any, *, first: bool = False) -> Tensor:
    nothing: list[list[int]] = [[] for _ in rows]
    columns = [_REAL_PROCESS(column[:, None], rows, nothing, processor) for column in logits_BSV.unbind(1)]
    return torch.cat(columns, dim=1)


@pytest.mark.parametrize(
    ("name", "wrong", "way", "cut"),
    [
        ("accept_sampled", _keeps_every_draft, "self_speculative", "temperature"),
        ("accept_sampled", _draws_again_from_the_target, "self_speculative", "temperature"),
        ("process", _shows_no_drafts, "self_speculative", "a processor of the context"),
    ],
)
def test_the_count_notices(
    name: str, wrong: Callable[..., object], way: str, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, name, wrong)
    assert _excess(_samples(way, cut, 2_000), cut) > 1.2


def test_the_count_notices_distributions_that_are_cut_for_the_drafter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = acceptance.probabilities
    plain = SamplingSettings(temperature=1.3)
    monkeypatch.setattr(
        acceptance,
        "probabilities",
        lambda logits, *, settings: real(logits, settings=settings if logits.dim() == 2 else plain),
    )
    cut = "top-k, top-p and min-p"
    assert _excess(_samples("self_speculative", cut, 2_000), cut) > 1.2


def test_a_seed_gives_the_same_in_any_batch_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    cut, decoder = "a processor of the context", FakeDecoder(_FULL, _EXITS, max_length=100)
    settings = _settings("self_speculative, adaptive", cut, max_new_tokens=30)
    outputs = []
    for batch in (1, 2, 5):
        results: list[DecodingResult] = []
        for first in range(0, 10, batch):
            generators = [torch.Generator().manual_seed(seed) for seed in range(first, first + batch)]
            results += decode_batch(
                decoder, [[0]] * batch, strategy="self_speculative", settings=settings, generators=generators
            )
        outputs.append([(result.tokens, result.steps) for result in results])
    assert outputs[0] == outputs[1] == outputs[2]
    assert len({tuple(tokens) for tokens, _ in outputs[0]}) == 10
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("full", "exits"),
    [
        ([[0.0, 0.0, 99.0, 0.0]] * 4, [[0.0, 99.0, 0.0, 0.0]] * 4),  # certain of different tokens
        ([[0.0, 0.0, 99.0, 0.0]] * 4, [[0.0, 0.0, 99.0, 0.0]] * 4),  # certain of the same
        ([[0.0, 0.0, 0.0, -torch.inf]] * 4, [[-torch.inf, 0.0, 0.0, 0.0]] * 4),  # drafts the full model never says
        ([[1.0, 2.0, 3.0, 4.0]] * 4, [[1.0, 2.0, 3.0, 4.0]] * 4),  # equal: nothing is left over
        ([[0.0, 0.0, 0.0, 0.0]] * 4, [[0.0, 0.0, 99.0, 0.0]] * 4),  # a draft of probability 1
    ],
)
def test_distributions_at_the_edge_give_tokens_that_the_full_model_may_say(
    full: list[list[float]], exits: list[list[float]]
) -> None:
    for temperature in (1e-300, 1e-9, 1.0):
        decoder = FakeDecoder(torch.tensor(full), torch.tensor(exits))
        sampling = SamplingSettings(temperature=temperature)
        settings = DecodingSettings(max_new_tokens=30, exit_layer=1, num_draft_tokens=4, sampling=sampling)
        result = decode(
            decoder, [0], strategy="self_speculative", settings=settings, generator=torch.Generator().manual_seed(0)
        )
        allowed = (torch.tensor(full[0]) / max(temperature, 1e-30)).softmax(-1).nan_to_num(1.0) > 0
        assert len(result.tokens) == 30
        assert all(allowed[token] for token in result.tokens)
        if full == exits and temperature == 1.0:
            assert result.accepted == result.drafted
