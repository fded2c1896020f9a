"""What a result says of its rounds, against counts made by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.decoding.engine import DecodingInterrupted, decode_batch
from app.decoding.result import DecodingResult, Step
from app.decoding.settings import DecodingSettings
from tests.support.decoding import decode
from tests.support.fake_decoder import FakeDecoder, counting_decoder
from tests.unit.decoding.circumstances import HostileClock, ends_after

# After 3 comes 4 and so on; exits miss after 6, 7 and 12. Of four drafts a round: 5 6 | 8 9: keeps two and adds 7;
# 9 10 11 12: keeps none and adds 8; 9 10 11 12: all, and 13 (right after a miss); 14 15 16 17: all, and 18; then 19.
_MISSES = (6, 7, 12)
_SETTINGS = DecodingSettings(max_new_tokens=16, exit_layer=2, num_draft_tokens=4)
_ROUNDS = (
    Step([5, 6, 7], 2, (8, 9)),
    Step([8], 0, (9, 10, 11, 12)),
    Step([9, 10, 11, 12, 13], 4),
    Step([14, 15, 16, 17, 18], 4),
    Step([19]),
)


def _result(*steps: Step) -> DecodingResult:
    tokens = [0, *(token for step in steps for token in step.tokens)]
    return DecodingResult(
        tokens=tokens, stop_reason="max_new_tokens", seconds_prefill=1.0, seconds_decode=2.0, steps=steps
    )


def test_the_rounds_are_those_worked_out_by_hand() -> None:
    result = decode(counting_decoder(misses=_MISSES), [3], strategy="self_speculative", settings=_SETTINGS)
    assert result.tokens == list(range(4, 20))
    assert result.steps == _ROUNDS
    assert (result.rounds, result.drafted, result.accepted) == (5, 16, 10)
    assert result.acceptance_rate == pytest.approx(10 / 16)
    assert result.mean_tokens_per_round == pytest.approx(15 / 5)
    # Every round but the last drafts four; the first token is kept in three, so the second is reached in three, ...
    assert result.reached_by_position == [4, 3, 3, 2]
    assert result.accepted_by_position == [3, 3, 2, 2]


def test_a_position_is_reached_only_where_all_before_it_were_kept_and_it_was_drafted() -> None:
    result = _result(Step([1, 2], 1, (9, 9)), Step([3, 4], 1), Step([5], 0, (9,)), Step([6]))
    assert result.reached_by_position == [3, 1, 0]
    assert result.accepted_by_position == [2, 0, 0]


def test_nothing_drafted_is_nothing_divided() -> None:
    result = _result(Step([1]), Step([2]))
    assert (result.acceptance_rate, result.reached_by_position, result.accepted_by_position) == (None, [], [])
    assert result.mean_tokens_per_round == 1.0
    assert _result().tokens_per_second is None
    assert _result().mean_tokens_per_round is None


@settings(max_examples=100)
@given(rounds=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8))
def test_positions_add_up_to_totals(rounds: list[tuple[int, int]]) -> None:
    result = _result(*(Step([7] * (accepted + 1), accepted, (8,) * rejected) for accepted, rejected in rounds))
    reached, accepted = result.reached_by_position, result.accepted_by_position
    assert sum(accepted) == result.accepted
    assert len(reached) == len(accepted) == max((step.drafted for step in result.steps), default=0)
    assert all(kept <= seen for kept, seen in zip(accepted, reached, strict=True))
    assert all(later <= earlier for earlier, later in zip(accepted, reached[1:], strict=False))


def test_the_first_token_is_the_prefills_and_the_last_ends_the_time() -> None:
    decoder = counting_decoder(misses=_MISSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.decoding.engine.perf_counter", HostileClock([1.0]))
        # Looked at before everything, after the prompt, and three times a round: begin, drafted, verified.
        result = decode(decoder, [3], strategy="self_speculative", settings=_SETTINGS)
    assert result.seconds_prefill == 1.0
    assert result.seconds_decode == 3.0 * 5
    assert result.num_decoded == 15
    assert result.tokens_per_second == 1.0


def test_the_last_round_counts_all_that_was_drafted_also_where_the_output_is_cut() -> None:
    cut = DecodingSettings(max_new_tokens=16, exit_layer=2, num_draft_tokens=4, stop=ends_after([9, 10]))
    streamed: list[Step] = []
    result = decode(
        counting_decoder(misses=_MISSES), [3], strategy="self_speculative", settings=cut, on_step=streamed.append
    )
    assert result.tokens == [4, 5, 6, 7, 8, 9, 10]
    assert result.steps == _ROUNDS[:3]
    assert streamed[-1] == Step([9, 10], 2)
    assert result.mean_tokens_per_round == pytest.approx(6 / 3)


def test_a_streamed_step_that_was_cut_shows_no_drafts_that_came_after_its_end() -> None:
    cut = DecodingSettings(max_new_tokens=16, exit_layer=2, num_draft_tokens=4, stop=ends_after([4, 5]))
    streamed: list[Step] = []
    result = decode(
        counting_decoder(misses=_MISSES), [3], strategy="self_speculative", settings=cut, on_step=streamed.append
    )
    assert streamed == [Step([4]), Step([5], 1)]
    assert result.steps == _ROUNDS[:1]


def _interrupt_at(call: int, streamed: list[tuple[int, Step]]):  # type: ignore[no-untyped-def]
    def on_step(index: int, step: Step) -> None:
        streamed.append((index, step))
        if len(streamed) == call:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("call", [1, 2, 3, 4, 6, 8, 11])
def test_ctrl_c_keeps_what_was_settled_in_every_row(call: int) -> None:
    decoder, prompts = counting_decoder(misses=_MISSES), [[3], [30], [9, 10]]
    chosen = DecodingSettings(max_new_tokens=14, exit_layer=2, num_draft_tokens=4, eos_token_ids=(33,))
    whole = decode_batch(decoder, prompts, strategy="self_speculative", settings=chosen)
    streamed: list[tuple[int, Step]] = []
    with pytest.raises(DecodingInterrupted, match="interrupted") as caught:
        decode_batch(
            decoder,
            prompts,
            strategy="self_speculative",
            settings=chosen,
            on_step=_interrupt_at(call, streamed),
        )
    for index, (result, uninterrupted) in enumerate(zip(caught.value.results, whole, strict=True)):
        own = [step for row, step in streamed if row == index]
        assert result.tokens == [token for step in own for token in step.tokens]
        assert result.tokens == uninterrupted.tokens[: len(result.tokens)]
        assert result.steps == uninterrupted.steps[: max(len(own) - 1, 0)]
        ended = len(result.tokens) == len(uninterrupted.tokens)
        assert result.stop_reason == (uninterrupted.stop_reason if ended else "interrupted")
        assert result.seconds_prefill >= 0
        assert result.seconds_decode >= 0


@pytest.mark.parametrize("run", [1, 2, 5, 6, 7, 11])
def test_ctrl_c_inside_the_model_keeps_what_was_settled_before(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = counting_decoder(misses=_MISSES)
    whole = decode(decoder, [3], strategy="self_speculative", settings=_SETTINGS)
    real, decoder = FakeDecoder.run_blocks, counting_decoder(misses=_MISSES)

    def run_blocks(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        if len(self.spans) == run:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(FakeDecoder, "run_blocks", run_blocks)
    with pytest.raises(DecodingInterrupted) as caught:
        decode(decoder, [3], strategy="self_speculative", settings=_SETTINGS)
    (result,) = caught.value.results
    rounds = sum(span[1] == 4 for span in decoder.spans) - 1  # verified
    assert result.steps == whole.steps[:rounds]
    assert result.tokens == whole.tokens[: len(result.tokens)]
    assert len(result.tokens) == 1 + sum(len(step.tokens) for step in result.steps)
    assert result.stop_reason == "interrupted"


def test_other_errors_of_a_listener_are_passed_on() -> None:
    def on_step(step: Step) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        decode(counting_decoder(), [3], strategy="autoregressive", settings=_SETTINGS, on_step=on_step)
