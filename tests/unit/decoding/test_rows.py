"""Token ids shown to processors of scores: those of every sequence, whatever was rejected and whoever left."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from app.decoding import acceptance
from app.decoding.engine import decode_batch
from app.decoding.result import Step
from app.decoding.rows import SequenceState, contexts
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings
from tests.support.decoding import decode
from tests.support.fake_decoder import FakeDecoder, counting_decoder

_NEEDS: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "self_speculative": {"exit_layer": 1, "num_draft_tokens": 3},
    "draft_model": {"num_draft_tokens": 3},
    "layer_skip": {"skipped_layers": (1, 2), "num_draft_tokens": 3},
}


def _settings(strategy: str, *, budget: int, temperature: float, **settings: Any) -> DecodingSettings:
    needs = dict(_NEEDS[strategy])
    if strategy == "draft_model":
        small = counting_decoder(misses=(9, 14, 30))
        small.full_logits = small.exit_logits
        needs["draft_decoder"] = small
    sampling = SamplingSettings(temperature=temperature, processor=lambda ids, scores: scores)
    return DecodingSettings(max_new_tokens=budget, sampling=sampling, **needs, **settings)


def _decoder(strategy: str) -> FakeDecoder:
    decoder = counting_decoder(misses=(3, 8, 9, 14, 22, 30))
    decoder.may_skip = strategy == "layer_skip"
    return decoder


def _shown_and_right(
    monkeypatch: pytest.MonkeyPatch, strategy: Any, temperature: float, *, keeps_drafts: bool = False
) -> list[bool]:
    """For every context that a processor could see whether it is what a list of everything so far says."""
    right: list[bool] = []

    def checked(
        rows: Sequence[SequenceState], drafts: Sequence[Sequence[int]], *, device: torch.device
    ) -> list[Tensor]:
        shown = contexts(rows, drafts, device=device)
        for row, drafted, ids_1S in zip(rows, drafts, shown, strict=True):
            right.append(ids_1S.tolist() == [[*row.prompt, *row.tokens, *drafted]])
            if keeps_drafts:
                row.context_S = ids_1S[0]
        return shown

    monkeypatch.setattr(acceptance, "contexts", checked)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)] if temperature else None
    settings = _settings(strategy, budget=30, temperature=temperature, eos_token_ids=(26, 45))
    prompts = [[20], [1, 2, 3], [40, 41], [5]]
    results = decode_batch(_decoder(strategy), prompts, strategy=strategy, settings=settings, generators=generators)
    assert len({len(result.tokens) for result in results}) > 1 or temperature
    assert strategy == "autoregressive" or any(step.rejected for result in results for step in result.steps)
    return right


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("strategy", _NEEDS)
def test_every_context_is_right_while_drafts_are_rejected_and_rows_leave(
    strategy: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _shown_and_right(monkeypatch, strategy, temperature)
    assert len(right) > 30
    assert all(right)


def test_the_comparison_notices_rejected_drafts_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _shown_and_right(monkeypatch, "self_speculative", 0.0, keeps_drafts=True)
    assert not all(right)


@pytest.mark.parametrize("strategy", _NEEDS)
def test_only_new_ids_are_sent_to_the_device(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    new_ids = SequenceState.new_ids
    monkeypatch.setattr(
        SequenceState, "new_ids", lambda self, drafted: sent.append(len(ids := new_ids(self, drafted))) or ids
    )
    decoder = _decoder(strategy)
    decoder.max_length = 2000
    prompt = [token % 5 for token in range(1000)]
    settings = _settings(strategy, budget=40, temperature=0.0)
    decode_batch(decoder, [prompt, prompt], strategy=strategy, settings=settings)
    assert sent[:2] == [len(prompt)] * 2
    assert max(sent[2:]) <= 4 + 3  # what the last round settled, and at most three drafts


def test_a_processor_free_decode_keeps_no_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "contexts", lambda *_, **__: pytest.fail("ids were sent to the device"))
    settings = DecodingSettings(max_new_tokens=9, **_NEEDS["self_speculative"])
    assert decode(_decoder(""), [1], strategy="self_speculative", settings=settings).tokens == list(range(2, 11))


def test_a_round_that_settles_two_ends_is_cut_at_the_first() -> None:
    """Static rounds and n-grams draft beyond an end."""
    unused: Any = None
    row = SequenceState(
        index=0,
        prompt=[1],
        room=50,
        settings=DecodingSettings(max_new_tokens=20, eos_token_ids=(7, 8)),
        policy=unused,
        pace=unused,
        n_grams=None,
        n_gram_pace=unused,
        generator=None,
    )
    row.settle(Step([3]), at=0.0)
    taken = row.settle(Step([4, 7, 5, 8, 6], accepted=4), at=1.0)
    assert (row.tokens, row.stop_reason) == ([3, 4, 7], "eos")
    assert (taken.tokens, taken.accepted) == ([4, 7], 2)
