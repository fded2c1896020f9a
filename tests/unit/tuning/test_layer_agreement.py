"""What one pass over the outputs says, against the real engine decoding them anew for every exit and draft length."""

from itertools import product

import pytest
import torch

from app.decoding.result import DecodingResult, RoundCounts
from app.decoding.settings import DecodingSettings
from app.model.exit_block import ExitBlock
from app.spans.decoder import SpanDecoder
from app.tuning.layer_agreement import LayerAgreement, measure_layer_agreement, simulate_rounds
from tests.support.decoding import decode
from tests.support.fake_decoder import counting_decoder
from tests.support.tiny_models import settling_llama, tiny_llama

_NEW_TOKENS = 24
_PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [58]]


def _engine(
    decoder: SpanDecoder,
    prompt: list[int],
    exit_layer: int | None,
    drafts: int | None,
    *,
    eos: tuple[int, ...] = (),
    match: int | None = None,
) -> DecodingResult:
    settings = DecodingSettings(
        max_new_tokens=_NEW_TOKENS,
        exit_layer=exit_layer,
        num_draft_tokens=drafts,
        eos_token_ids=eos,
        n_gram_match=match,
        n_gram_max_drafts=5,
    )
    return decode(decoder, prompt, strategy="self_speculative" if exit_layer else "n_gram", settings=settings)


def _counts(counts: RoundCounts) -> list[int]:
    return [counts.rounds, counts.drafted, counts.accepted]


def test_simulated_rounds_are_those_of_the_engine_for_every_exit_draft_length_and_draft_vocabulary() -> None:
    model = settling_llama(later_blocks=0.1)
    own = ExitBlock(model, exit_layer=2, source_layers=[3]).eval()
    decoder = SpanDecoder(model, exit_blocks={2: own})
    settings, ids = DecodingSettings(max_new_tokens=_NEW_TOKENS), [*range(49, -1, -1)]
    decoder.use_draft_vocabulary([1, 2])  # whatever is in use makes no difference
    agreement = measure_layer_agreement(decoder, _PROMPTS, settings, vocabularies=[ids, ids[:20]])
    assert agreement.num_exit_blocks == {2: 1}
    assert all(map(all, agreement.matches[4])), "the full model may say what is not drafted"
    kept = set()
    for exit_layer, size in product((1, 2, 3), (None, 50, 20)):
        decoder.use_draft_vocabulary(size and ids[:size])
        for drafts in (1, 3, 8, 30):
            results = [_engine(decoder, prompt, exit_layer, drafts) for prompt in _PROMPTS]
            expected = [sum(getattr(r, name) for r in results) for name in ("rounds", "drafted", "accepted")]
            assert _counts(agreement.count_rounds(exit_layer, drafts, size=size)) == expected, (exit_layer, drafts)
            kept |= {step.accepted for result in results for step in result.steps if step.drafted == 3}
        assert len({agreement.agreement(exit_layer, other) for other in (None, 50, 20)}) == 3
    assert kept == {0, 1, 2, 3}  # all kinds of rounds were among them
    found = agreement.found_drafts(1, most=5)
    for exit_layer, drafts, size in ((None, None, None), (1, 3, 50), (2, 1, None), (3, 8, 20)):
        decoder.use_draft_vocabulary(size and ids[:size])
        results = [_engine(decoder, prompt, exit_layer, drafts, match=1) for prompt in _PROMPTS]
        counted = agreement.count_rounds(exit_layer, drafts or 0, found, size=size)
        for name in ("rounds", "drafted", "accepted", "rounds_by_n_gram", "drafted_by_n_gram", "accepted_by_n_gram"):
            assert getattr(counted, name) == sum(getattr(r, name) for r in results), (exit_layer, name)
        assert 0 < counted.accepted_by_n_gram < counted.drafted_by_n_gram


def test_simulated_rounds_are_those_of_the_engine_where_outputs_end_by_themselves() -> None:
    decoder = SpanDecoder(settling_llama(later_blocks=0.1))
    whole = measure_layer_agreement(decoder, _PROMPTS, DecodingSettings(max_new_tokens=_NEW_TOKENS)).outputs
    ended = drafted_ends = 0
    for eos in sorted({token for output in whole for token in output})[::4]:
        agreement = measure_layer_agreement(
            decoder, _PROMPTS, DecodingSettings(max_new_tokens=_NEW_TOKENS, eos_token_ids=(eos,))
        )
        for index, prompt in enumerate(_PROMPTS):
            for exit_layer in (1, 2, 3):
                for drafts in (1, 3, 8):
                    result = _engine(decoder, prompt, exit_layer, drafts, eos=(eos,))
                    assert result.tokens == agreement.outputs[index]
                    simulated = simulate_rounds(agreement.matches[exit_layer][index], drafts, budget=_NEW_TOKENS)
                    assert (simulated.rounds, simulated.accepted) == (result.rounds, result.accepted)
                    if not any(eos in step.rejected for step in result.steps):
                        assert simulated.drafted == result.drafted
                    ended += result.stop_reason == "eos"
                    drafted_ends += bool(result.steps) and result.steps[-1].accepted == len(result.steps[-1].tokens) - 1
    assert ended > 20
    assert drafted_ends > 3


def test_simulated_rounds_are_those_of_the_engine_at_the_end_of_the_context() -> None:
    model = tiny_llama(seed=1, num_layers=3, tied=False, max_length=20)
    decoder, prompt = SpanDecoder(model), [3, 1, 4, 1, 5]
    agreement = measure_layer_agreement(decoder, [prompt], DecodingSettings(max_new_tokens=_NEW_TOKENS))
    assert agreement.budgets == [15]
    for drafts in (1, 4, 16):
        result = _engine(decoder, prompt, 2, drafts)
        assert _counts(agreement.count_rounds(2, drafts)) == [result.rounds, result.drafted, result.accepted]


@pytest.mark.parametrize(
    ("matches", "drafts", "budget", "expected"),
    [
        ([], 4, None, (0, 0, 0)),
        ([True], 4, None, (1, 0, 0)),  # one token is left: nothing to draft
        ([False] * 4, 2, None, (4, 5, 0)),  # limits 2, 2, 1, 0
        ([True] * 5, 2, None, (2, 3, 3)),  # limits 2, 1
        ([True, False, True, True, True], 3, None, (2, 5, 3)),
        ([True] * 5, 8, 50, (1, 5, 5)),  # the fifth is an end of sequence
        ([True, True, False], 8, 50, (1, 8, 2)),  # the correction is
    ],
)
def test_rounds_by_hand(matches: list[bool], drafts: int, budget: int | None, expected: tuple[int, ...]) -> None:
    counts = simulate_rounds(matches, drafts, budget=budget or len(matches) + 1)
    assert (*_counts(counts), counts.num_decoded) == (*expected, len(matches))


def test_agreement_is_the_share_of_equal_choices_by_the_plain_model() -> None:
    model = settling_llama(later_blocks=0.1)
    agreement = measure_layer_agreement(SpanDecoder(model), _PROMPTS, DecodingSettings(max_new_tokens=_NEW_TOKENS))
    for exit_layer in (1, 2, 3, 4):
        same = total = 0
        for prompt, output in zip(_PROMPTS, agreement.outputs, strict=True):
            with torch.no_grad():
                out = model(torch.tensor([prompt + output[:-1]]), output_hidden_states=True)
                logits = out.logits
                if exit_layer < 4:
                    logits = model.lm_head(model.model.norm(out.hidden_states[exit_layer]))
            same += int((logits[0, len(prompt) :].argmax(-1) == torch.tensor(output[1:])).sum())
            total += len(output) - 1
        assert agreement.agreement(exit_layer) == pytest.approx(same / total)
    assert agreement.num_positions == len(_PROMPTS) * (_NEW_TOKENS - 1)
    assert agreement.agreement(4) == 1.0
    assert agreement.agreement(1) < agreement.agreement(3) < 1.0


def test_chunks_of_positions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = SpanDecoder(settling_llama(later_blocks=0.1))
    whole = measure_layer_agreement(decoder, _PROMPTS, DecodingSettings(max_new_tokens=_NEW_TOKENS))
    monkeypatch.setattr("app.exits.states._LOGITS_PER_CHUNK", 3 * decoder.vocab_size)
    longest = []
    unembed = SpanDecoder.unembed
    monkeypatch.setattr(
        SpanDecoder, "unembed", lambda self, h, **of: longest.append(h.shape[1]) or unembed(self, h, **of)
    )
    assert measure_layer_agreement(decoder, _PROMPTS, DecodingSettings(max_new_tokens=_NEW_TOKENS)) == whole
    assert max(longest) == 3


def test_the_saturation_layer_is_the_first_exit_after_the_last_miss() -> None:
    matches = {1: [[True, True, False]], 2: [[True, False, False]], 3: [[True, True, False]], 4: [[True] * 3]}
    agreement = LayerAgreement(num_layers=4, prompts=[[9]], outputs=[[9, 9, 9, 9]], budgets=[4], matches=matches)
    assert agreement.mean_saturation_layer == pytest.approx((1 + 3 + 4) / 3)


def test_an_output_of_one_token_or_none_has_no_position() -> None:
    decoder = counting_decoder(max_length=16)
    agreement = measure_layer_agreement(
        decoder, [[4], list(range(16))], DecodingSettings(max_new_tokens=8, eos_token_ids=(5,))
    )
    assert agreement.outputs == [[5], []]
    assert agreement.num_positions == 0
    assert _counts(agreement.count_rounds(1, 4)) == [0, 0, 0]


def test_no_prompt_is_started_after_the_time_limit_but_the_first() -> None:
    done: list[int] = []
    settings = DecodingSettings(max_new_tokens=4)
    agreement = measure_layer_agreement(
        counting_decoder(), [[1], [2], [3]], settings, time_limit_seconds=0.0, on_prompt=done.append
    )
    assert agreement.outputs == [[2, 3, 4, 5]]
    assert done == [1]
