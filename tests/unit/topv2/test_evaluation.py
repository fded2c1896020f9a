from collections.abc import Sequence
from dataclasses import replace

from app.benchmark.decoding_comparison import DecodingComparison
from app.protocols import GenerationExample
from app.topv2.evaluation import ParsePlan, ParseResult, ParseWay, collect_results, evaluate_parses
from app.topv2.metrics import ParseExactMatch, ParseScore
from tests.support.fake_decoder import FakeDecoder, counting_decoder

# The full model says 1 2 3 4 after 0, and 11 12 13 14 after 10; 4 and 14 end an answer.
TEXTS = {1: "[IN:A", 2: "say", 3: "]", 11: "[IN:A", 12: "[SL:B", 13: "] ]"}
EXAMPLES = [
    GenerationExample([0], "[IN:A say ]", "alarm"),
    GenerationExample([30, 10], "[IN:A [SL:B ] ]", "weather"),
    GenerationExample([20], "[IN:A say ]", "weather"),  # the model has it wrong
]
PLAN = ParsePlan(
    num_layers=4,
    exit_layers=(1, 3),
    num_draft_tokens=(2,),
    max_new_tokens=8,
    eos_token_ids=(4, 14, 24),
    batch_size=2,
    time_limit_seconds=60.0,
)
FULL, FIRST, THIRD = ParseWay("autoregressive", 4), ParseWay("early_exit", 1), ParseWay("early_exit", 3)
TIMED, DRAFTING = ParseWay("autoregressive", 4, 0), ParseWay("self_speculative", 1, 2)


def _decoder() -> FakeDecoder:
    return counting_decoder(misses=(1, 12))  # exits leave the word out, and the end of the other answer


def _answer(tokens: Sequence[int]) -> str:
    return " ".join(TEXTS.get(token, "") for token in tokens)


def evaluate(
    plan: ParsePlan = PLAN, *, num_examples: int = 3, num_speed: int = 3, decoder: FakeDecoder | None = None
) -> tuple[dict[ParseWay, ParseResult], list[DecodingComparison]]:
    metrics = {way: ParseExactMatch(["alarm", "weather"], target_format="parse") for way in plan.ways}
    speeds = evaluate_parses(
        decoder or _decoder(), EXAMPLES[:num_examples], EXAMPLES[:num_speed], plan=plan, answer=_answer, metrics=metrics
    )
    return {result.way: result for result in collect_results(metrics, speeds)}, speeds


def test_every_way_is_scored_by_its_own_answers() -> None:
    results, _ = evaluate()
    assert list(results) == PLAN.ways == [FULL, FIRST, THIRD, TIMED, DRAFTING, ("self_speculative", 3, 2)]
    assert results[FULL].scores.overall == ParseScore(2 / 3, 2 / 3, 2 / 3, 3)
    assert results[FULL].scores.by_group == {"alarm": ParseScore(1, 1, 1, 1), "weather": ParseScore(0.5, 0.5, 0.5, 2)}
    assert results[FIRST].scores.overall == ParseScore(0, 1 / 3, 1 / 3, 3)  # "[IN:A ]" asks for the same
    assert results[DRAFTING].scores == results[TIMED].scores == results[FULL].scores


def test_drafts_are_compared_with_autoregressive_decoding_of_the_same_examples() -> None:
    results, speeds = evaluate(num_speed=2)
    speed = results[DRAFTING].speed
    assert speed is speeds[0] is not speeds[1]
    assert speed is not None
    assert (speed.num_prompts, speed.identical) == (2, 2)
    assert speed.num_decoded == speed.baseline_decoded == 6
    assert 0 < speed.accepted < speed.drafted
    assert results[FULL].speed is results[FIRST].speed is results[TIMED].speed is None
    assert results[FULL].scores.overall.num_examples == 3
    assert results[DRAFTING].scores.overall == results[TIMED].scores.overall == ParseScore(1, 1, 1, 2)


def test_without_draft_lengths_nothing_drafts_and_no_speed_is_measured() -> None:
    decoder = _decoder()
    results, speeds = evaluate(replace(PLAN, num_draft_tokens=()), decoder=decoder)
    assert list(results) == [FULL, FIRST, THIRD]
    assert speeds == []
    assert all(start == 0 for start, _, _ in decoder.spans)


def test_no_batch_is_started_after_the_time_limit_but_the_first_is_decoded() -> None:
    results, _ = evaluate(replace(PLAN, time_limit_seconds=0.0))
    assert {way: result.scores.overall.num_examples for way, result in results.items()} == dict.fromkeys(
        (FULL, FIRST, THIRD), 2
    ) | dict.fromkeys(PLAN.timed, 1)


def test_batches_change_speed_alone() -> None:
    singly, together = evaluate(replace(PLAN, batch_size=1))[0], evaluate(replace(PLAN, batch_size=3))[0]
    assert {way: result.scores for way, result in singly.items()} == {way: r.scores for way, r in together.items()}


def test_a_rank_without_examples_has_nothing_to_add() -> None:
    assert evaluate(num_examples=0, num_speed=0) == ({}, [])


def test_an_answer_that_is_cut_short_is_wrong() -> None:
    results, _ = evaluate(replace(PLAN, max_new_tokens=2))
    assert results[FULL].scores.overall == ParseScore(0, 0, 0, 3)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_answered_wrong() -> None:
    longest = GenerationExample([0] * 100, "[IN:A say ]", "alarm")
    plan = replace(PLAN, num_draft_tokens=())
    metrics = {way: ParseExactMatch(["alarm"], target_format="parse") for way in plan.ways}
    evaluate_parses(_decoder(), [longest, EXAMPLES[0]], [], plan=plan, answer=_answer, metrics=metrics)
    assert collect_results(metrics, [])[0].scores.overall == ParseScore(1 / 2, 1 / 2, 1 / 2, 2)
