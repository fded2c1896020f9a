import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from app.benchmark.alternation import Contender, Measurement, Prompts, alternate, engine_contender
from app.benchmark.output_differences import OutputDifferences, find_output_differences
from app.decoding.result import DecodingResult
from app.decoding.settings import DecodingSettings
from app.protocols import ExitableDecoder
from app.spans.decoder import SpanDecoder
from tests.support.fake_decoder import FakeDecoder
from tests.support.tiny_models import tiny_llama

BATCHES = [[[1], [10, 11]], [[20]]]
Edit = dict[int, list[int]]  # the first token of a prompt -> its output


def _near_ties(gap: float) -> FakeDecoder:
    """After t comes t + 1; t + 2 is the runner-up, by `gap` of a logit of 1."""
    certain = torch.eye(50).roll(1, dims=1)
    return FakeDecoder(certain + (1.0 - gap) * certain.roll(1, dims=1), certain)


def _contender(decoder: ExitableDecoder, name: str, *edits: Edit) -> Contender:
    """Autoregressive decoding, but for the outputs that are written down for each repeat."""
    honest = engine_contender(decoder, "autoregressive", DecodingSettings(max_new_tokens=6, eos_token_ids=(40,)))
    turns = [Edit()] * len(BATCHES) if not edits else list(edits)
    calls: dict[int, int] = {}

    def decode(prompts: Prompts, settings: DecodingSettings) -> Sequence[DecodingResult]:
        call = calls.get(prompts[0][0], -1 if not calls else 0)  # it warms up with the first
        calls[prompts[0][0]] = call + 1
        edit = turns[call % len(turns)]
        results = honest.decode(prompts, settings)
        return [
            replace(result, tokens=edit.get(prompt[0], result.tokens))
            for prompt, result in zip(prompts, results, strict=True)
        ]

    return Contender(strategy=name, settings=honest.settings, decode=decode)


def _differences(decoder: ExitableDecoder, *others: Contender, batches: Sequence[Prompts] = BATCHES) -> list[
    OutputDifferences
]:  # fmt: skip
    plain = engine_contender(decoder, "autoregressive", DecodingSettings(max_new_tokens=6, eos_token_ids=(40,)))
    measured: list[Measurement] = alternate([plain, *others], batches, repeats=2)
    found = find_output_differences(decoder, batches, measured, eos_token_ids=(40,))
    assert found[0] == OutputDifferences(num_prompts=3, num_differing=0)
    return found[1:]


WRONG = [12, 13, 15, 15, 16, 17]  # for 12, 13, 14, 15, 16, 17


@pytest.mark.parametrize(("gap", "bug"), [(0.25, True), (2.0**-20, False)])
def test_the_gap_at_the_first_position_that_differs_tells_a_tie_from_a_bug(
    caplog: pytest.LogCaptureFixture, gap: float, bug: bool
) -> None:
    decoder = _near_ties(gap)
    with caplog.at_level(logging.WARNING):
        (found,) = _differences(decoder, _contender(decoder, "self_speculative", {}, {10: WRONG}))
    assert found == OutputDifferences(
        num_prompts=3,
        num_differing=1,
        num_unexplained=int(bug),
        largest_logit_gap=gap,
        largest_gap_in_spacings=gap * 2**23,
    )
    assert [("self_speculative" in r.getMessage(), "please report" in r.getMessage()) for r in caplog.records] == [
        (True, True)
    ] * bug


def test_outputs_that_are_the_same_are_not_decoded_again() -> None:
    decoder = _near_ties(0.25)
    plain = engine_contender(decoder, "autoregressive", DecodingSettings(max_new_tokens=6))
    measured = alternate([plain, plain], BATCHES, repeats=1)
    runs = len(decoder.spans)
    assert find_output_differences(decoder, BATCHES, measured, eos_token_ids=()) == [OutputDifferences(
        num_prompts=3, num_differing=0
    )] * 2  # fmt: skip
    assert len(decoder.spans) == runs


def test_the_batch_is_decoded_as_it_was_and_rows_that_end_leave_it() -> None:
    decoder, batches = _near_ties(0.25), [[[39], [10, 11]]]  # 40 ends
    plain = engine_contender(decoder, "autoregressive", DecodingSettings(max_new_tokens=6, eos_token_ids=(40,)))
    plain.decode(batches[0], replace(plain.settings, max_new_tokens=4))
    as_it_was = list(decoder.heads)
    measured = alternate([plain, _contender(decoder, "self_speculative", {10: WRONG})], batches, repeats=1)
    decoder.heads.clear()
    find_output_differences(decoder, batches, measured, eos_token_ids=(40,))
    assert decoder.heads[1:][: len(as_it_was)] == as_it_was  # after one that tells the number type
    assert as_it_was == [2, 1, 1, 1]


def test_every_prompt_that_differs_counts_once_and_the_largest_gap_is_told() -> None:
    decoder = _near_ties(0.25)
    decoder.full_logits[22, 24] = 0.5  # a runner-up further behind
    twice = {10: WRONG, 20: [21, 22, 24, 24, 25, 26]}
    (found,) = _differences(decoder, _contender(decoder, "transformers", twice, twice))
    assert (found.num_differing, found.num_unexplained, found.largest_logit_gap) == (2, 2, 0.5)
    assert str(found) == "2 of 3 prompts differ; largest logit gap 0.5 (4.19e+06 spacings)"


def test_an_output_that_ends_too_soon_has_no_gap_and_is_no_tie() -> None:
    decoder = _near_ties(2.0**-20)
    (found,) = _differences(decoder, _contender(decoder, "self_speculative", {10: WRONG[:2]}))
    assert (found.num_differing, found.num_unexplained, found.largest_logit_gap) == (1, 1, None)
    assert str(found) == "1 of 3 prompts differ"


def test_a_lossy_strategy_has_no_gaps_and_alarms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    decoder = _near_ties(0.25)
    (found,) = _differences(decoder, _contender(decoder, "early_exit", {10: WRONG}))
    assert found == OutputDifferences(num_prompts=3, num_differing=1)
    assert not caplog.records


def test_gaps_of_a_real_model_are_those_of_its_own_forward() -> None:
    model = tiny_llama(tied=False)
    decoder = SpanDecoder(model)
    plain = engine_contender(decoder, "autoregressive", DecodingSettings(max_new_tokens=6))
    honest = [result.tokens for result in plain.decode(BATCHES[0], plain.settings)]
    other = [*honest[1][:4], (honest[1][4] + 1) % decoder.vocab_size, 0]
    (found,) = _differences(decoder, _contender(decoder, "self_speculative", {10: other}))
    with torch.no_grad():
        logits = model(torch.tensor([[*BATCHES[0][1], *honest[1][:4]]])).logits[0, -1]
    assert found.largest_logit_gap == pytest.approx(float(logits[honest[1][4]] - logits[other[4]]), abs=1e-4)


@pytest.mark.parametrize(("spacings", "bug"), [(8.0, False), (9.0, True)])
def test_bfloat16_has_its_own_spacing_and_a_bound_of_8_of_them(spacings: float, bug: bool) -> None:
    decoder = _near_ties(spacings * 2.0**-7)
    decoder.full_logits, decoder.exit_logits = decoder.full_logits.bfloat16(), decoder.exit_logits.bfloat16()
    (found,) = _differences(decoder, _contender(decoder, "self_speculative", {10: WRONG}))
    assert (found.largest_gap_in_spacings, found.num_unexplained) == (spacings, int(bug))
