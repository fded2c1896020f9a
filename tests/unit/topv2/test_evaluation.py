from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table as RichTable

from app.benchmark.decoding_comparison import DecodingComparison
from app.benchmark.speedup_interval import PairedTimes
from app.errors import DataError
from app.protocols import GenerationExample
from app.topv2.evaluation import ParsePlan, ParseResult, Way, collect_results, evaluate_parses
from app.topv2.metrics import ParseExactMatch, ParseScore, ParseScores
from app.topv2.report import ParseReport, read_report, report_metrics, report_table, write_report
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
FULL, FIRST, THIRD = Way("autoregressive", 4), Way("early_exit", 1), Way("early_exit", 3)
TIMED, DRAFTING = Way("autoregressive", 4, 0), Way("self_speculative", 1, 2)


def _decoder() -> FakeDecoder:
    return counting_decoder(misses=(1, 12))  # exits leave the word out, and the end of the other answer


def _answer(tokens: Sequence[int]) -> str:
    return " ".join(TEXTS.get(token, "") for token in tokens)


def _evaluate(
    plan: ParsePlan = PLAN, *, num_examples: int = 3, num_speed: int = 3, decoder: FakeDecoder | None = None
) -> tuple[dict[Way, ParseResult], list[DecodingComparison]]:
    metrics = {way: ParseExactMatch(["alarm", "weather"], target_format="parse") for way in plan.ways}
    speeds = evaluate_parses(
        decoder or _decoder(), EXAMPLES[:num_examples], EXAMPLES[:num_speed], plan=plan, answer=_answer, metrics=metrics
    )
    return {result.way: result for result in collect_results(metrics, speeds)}, speeds


def _report(**changes: object) -> ParseReport:
    results, _ = _evaluate()
    report = ParseReport(stage="test", step=70, checkpoint=None, num_ranks=1, plan=PLAN, results=list(results.values()))
    return replace(report, **changes)  # type: ignore[arg-type]


def test_every_way_is_scored_by_its_own_answers() -> None:
    results, _ = _evaluate()
    assert list(results) == PLAN.ways == [FULL, FIRST, THIRD, TIMED, DRAFTING, ("self_speculative", 3, 2)]
    assert results[FULL].scores.overall == ParseScore(2 / 3, 2 / 3, 2 / 3, 3)
    assert results[FULL].scores.by_group == {"alarm": ParseScore(1, 1, 1, 1), "weather": ParseScore(0.5, 0.5, 0.5, 2)}
    assert results[FIRST].scores.overall == ParseScore(0, 1 / 3, 1 / 3, 3)  # "[IN:A ]" asks for the same
    assert results[DRAFTING].scores == results[TIMED].scores == results[FULL].scores


def test_drafts_are_compared_with_autoregressive_decoding_of_the_same_examples() -> None:
    results, speeds = _evaluate(num_speed=2)
    speed = results[DRAFTING].speed
    assert speed is speeds[0] is not speeds[1]
    assert speed is not None
    assert (speed.num_prompts, speed.identical) == (2, 2)
    assert speed.decoded == speed.baseline_decoded == 6
    assert 0 < speed.accepted < speed.drafted
    assert results[FULL].speed is results[FIRST].speed is results[TIMED].speed is None
    assert results[FULL].scores.overall.num_examples == 3
    assert results[DRAFTING].scores.overall == results[TIMED].scores.overall == ParseScore(1, 1, 1, 2)


def test_without_draft_lengths_nothing_drafts_and_no_speed_is_measured() -> None:
    decoder = _decoder()
    results, speeds = _evaluate(replace(PLAN, num_draft_tokens=()), decoder=decoder)
    assert list(results) == [FULL, FIRST, THIRD]
    assert speeds == []
    assert all(start == 0 for start, _, _ in decoder.spans)


def test_no_batch_is_started_after_the_time_limit_but_the_first_is_decoded() -> None:
    results, _ = _evaluate(replace(PLAN, time_limit_seconds=0.0))
    assert {way: result.scores.overall.num_examples for way, result in results.items()} == dict.fromkeys(
        (FULL, FIRST, THIRD), 2
    ) | dict.fromkeys(PLAN.timed, 1)


def test_batches_change_speed_alone() -> None:
    singly, together = _evaluate(replace(PLAN, batch_size=1))[0], _evaluate(replace(PLAN, batch_size=3))[0]
    assert {way: result.scores for way, result in singly.items()} == {way: r.scores for way, r in together.items()}


def test_a_rank_without_examples_has_nothing_to_add() -> None:
    assert _evaluate(num_examples=0, num_speed=0) == ({}, [])


def test_an_answer_that_is_cut_short_is_wrong() -> None:
    results, _ = _evaluate(replace(PLAN, max_new_tokens=2))
    assert results[FULL].scores.overall == ParseScore(0, 0, 0, 3)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_answered_wrong() -> None:
    longest = GenerationExample([0] * 100, "[IN:A say ]", "alarm")
    plan = replace(PLAN, num_draft_tokens=())
    metrics = {way: ParseExactMatch(["alarm"], target_format="parse") for way in plan.ways}
    evaluate_parses(_decoder(), [longest, EXAMPLES[0]], [], plan=plan, answer=_answer, metrics=metrics)
    assert collect_results(metrics, [])[0].scores.overall == ParseScore(1 / 2, 1 / 2, 1 / 2, 2)


def test_records_hold_what_was_measured_and_none_elsewhere() -> None:
    full, early, _, timed, drafting, _ = _report().records()
    assert (full["strategy"], full["exit_layer"], full["num_draft_tokens"]) == ("autoregressive", 4, None)
    assert full["by_group"]["weather"] == {
        "exact_match": 0.5,
        "frame_match": 0.5,
        "well_formed": 0.5,
        "num_examples": 2,
    }
    assert full["ms_per_token"] is full["speedup"] is early["ms_per_token"] is timed["speedup"] is None
    assert drafting["identical_share"] == 1.0
    assert timed["ms_per_token"] / drafting["ms_per_token"] == pytest.approx(drafting["speedup"])
    assert full.keys() == early.keys() == timed.keys() == drafting.keys()


def test_metrics_tell_exits_drafts_and_groups_apart() -> None:
    metrics = report_metrics(_report(stage="validate"))
    assert metrics["parse/exact_match/exit_04"] == 2 / 3
    assert metrics["parse/frame_match/exit_01"] == 1 / 3
    assert metrics["parse/exact_match_by_domain/weather/exit_04"] == 0.5
    assert metrics["parse/self_speculative/exact_match/exit_01_drafts_02"] == 2 / 3
    assert metrics["parse/autoregressive/exact_match/exit_04_drafts_00"] == 2 / 3
    assert metrics["parse/autoregressive/ms_per_token/exit_04_drafts_00"] > 0
    assert 0 < metrics["parse/self_speculative/acceptance_rate/exit_01_drafts_02"] < 1
    assert "parse/speedup/exit_01" not in metrics
    assert report_metrics(_report()).keys() == {f"test/{name}" for name in metrics}


def test_the_table_has_a_row_a_way_and_a_row_a_group() -> None:
    table = report_table(_report())
    cells = {row[:3]: row for row in table.rows}
    assert cells["full model", "4", "-"][3:7] == ("3", "66.7%", "66.7%", "66.7%")
    assert cells["early exit", "1", "-"][3:] == ("3", "0.0%", "33.3%", "33.3%", "-", "-", "-", "-")
    assert cells["self speculative", "1", "2"][-1] == "100.0%"
    assert cells["full model: weather", "4", "-"][3:] == ("2", "50.0%", "50.0%", "50.0%", "-", "-", "-", "-")
    assert cells["autoregressive", "4", "0"][3:8] == ("3", "66.7%", "66.7%", "66.7%", "-")
    assert table.title == "Semantic parses generated (test, step 70)"
    assert report_table(_report(step=None)).title == "Semantic parses generated (test)"
    assert report_table(_report(num_ranks=2)).title.endswith("on 2 ranks")


def test_the_table_of_all_domains_is_at_most_120_wide() -> None:
    score = ParseScore(1.0, 1.0, 1.0, 10_000)
    times = PairedTimes(10_000, 1e7, 1e4, 1.0, 1.0, 1.0)
    speed = DecodingComparison(**dict.fromkeys(DecodingComparison.__dataclass_fields__, 10_000) | {"times": times})
    scores = ParseScores(score, {"navigation": score, "messaging": score})
    report = _report(results=[ParseResult(way, scores, speed if way.num_draft_tokens else None) for way in PLAN.ways])
    table = report_table(report)
    drawn = RichTable(*table.columns, title=table.title)
    for row in table.rows:
        drawn.add_row(*row)
    assert Console(width=1000).measure(drawn).maximum <= 120


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    report, path = _report(), tmp_path / "new" / "parse_test.json"
    write_report(report, path)
    document = read_report(path)
    assert document["results"] == report.records()
    assert (document["stage"], document["step"], document["plan"]["max_new_tokens"]) == ("test", 70, 8)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{}",
        "[]",
        '{"stage": "test", "results": 3}',
        '{"stage": "test", "results": [{"speedup": 1}]}',
        '{"stage": "test", "results": []}',
    ],
)
def test_a_file_that_is_no_report_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"report.json: no results of semantic parses"):
        read_report(path)
