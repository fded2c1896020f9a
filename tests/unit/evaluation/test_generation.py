"""What a model writes at every exit, lossy and lossless, on tiny random models and scripted answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.benchmark import alternation
from app.decoding.result import DecodingResult
from app.decoding.settings import DecodingSettings
from app.errors import ConfigError, DataError
from app.evaluation import generation
from app.evaluation.generation import Way, run_generation, ways_of
from app.evaluation.records import EvaluatedModel, EvaluationSettings, Record
from app.evaluation.rows import Item, read_items
from app.evaluation.task import AnswerExample, GenerationTask
from app.evaluation.tasks.topv2 import TOPV2
from app.spans.decoder import SpanDecoder
from app.text.text_stream import continuation
from app.topv2.evaluation import ParsePlan, collect_results, evaluate_parses
from app.topv2.metrics import ParseExactMatch
from tests.support.decoding import decode
from tests.support.fake_decoder import counting_decoder
from tests.support.tiny_models import tiny_llama
from tests.support.tokenizers import byte_level
from tests.support.topv2_folders import small_topv2

EXITS = (1, 3, 4)
PROMPTS = ("the end of the END", "x = 1", "more cafés")
SETTINGS = EvaluationSettings(batch_size=2, num_draft_tokens=3, max_new_tokens=12)
TASK = GenerationTask(
    name="letters",
    hub=None,
    example=lambda row: AnswerExample(row.text("prompt"), ("x",)),
    score=lambda text, example: {"has_e": float("e" in text)},
)


@pytest.fixture(scope="module")
def subject() -> EvaluatedModel:
    tokenizer = byte_level()
    model = tiny_llama(num_layers=4, vocab_size=len(tokenizer), max_length=96, tied=False)
    return EvaluatedModel(SpanDecoder(model), tokenizer, ())


def _items(*, prompts: Sequence[str] = PROMPTS, **settings: Any) -> list[Item]:
    return [
        Item(row, "", f"file, row {row + 1}", AnswerExample(prompt, ("x",), **settings))
        for row, prompt in enumerate(prompts)
    ]


def _run(
    subject: EvaluatedModel,
    items: Sequence[Item],
    settings: EvaluationSettings = SETTINGS,
    *,
    task: GenerationTask = TASK,
) -> list[Record]:
    return sorted(run_generation(subject, task, items, EXITS, settings), key=lambda record: record.row)


@pytest.fixture(scope="module")
def records(subject: EvaluatedModel) -> list[Record]:
    return _run(subject, _items())


def test_lossless_ways_write_the_full_models_text_and_lossy_ones_the_exits(
    subject: EvaluatedModel, records: list[Record]
) -> None:
    for record, prompt in zip(records, PROMPTS, strict=True):
        tokens = subject.tokenizer(prompt)["input_ids"]
        texts = record.detail["answers"]
        for exit_layer in EXITS:
            settings = DecodingSettings(max_new_tokens=12, exit_layer=exit_layer if exit_layer < 4 else None)
            strategy = "early_exit" if exit_layer < 4 else "autoregressive"
            alone = decode(subject.decoder, tokens, strategy=strategy, settings=settings)
            assert texts[f"{strategy} {exit_layer}"] == continuation(subject.tokenizer, tokens, alone.tokens)
        assert texts["self_speculative 1"] == texts["self_speculative 3"] == texts["autoregressive 4"]
        assert texts["early_exit 1"] != texts["autoregressive 4"]


def test_each_way_is_scored_and_says_what_it_took(records: list[Record]) -> None:
    for record in records:
        for score in record.scores:
            text = record.detail["answers"][f"{score.strategy} {score.exit_layer}"]
            assert score.values == {"has_e": float("e" in text)}
            assert score.decoded is not None
            assert score.decoded.tokens == 11
            assert score.decoded.seconds > 0
            drafts = score.strategy == "self_speculative"
            assert (score.decoded.drafted > 0) == drafts
            assert score.decoded.identical == (True if drafts else None)
    assert len({score.values["has_e"] for record in records for score in record.scores}) == 2


def test_batches_change_nothing_but_the_time(subject: EvaluatedModel, records: list[Record]) -> None:
    for other, record in zip(_run(subject, _items(), replace(SETTINGS, batch_size=1)), records, strict=True):
        assert other.detail == record.detail
        assert [score.values for score in other.scores] == [score.values for score in record.scores]


def test_drafts_are_measured_beside_the_full_model_or_not_at_all() -> None:
    full, lossy, lossless = Way("autoregressive", 4), Way("early_exit", 2), Way("self_speculative", 2)
    assert ways_of([2, 4], num_layers=4, num_draft_tokens=3) == [full, lossy, lossless]
    assert ways_of([2], num_layers=4, num_draft_tokens=3) == [full, lossy, lossless]
    assert ways_of([2], num_layers=4, num_draft_tokens=0) == [lossy]
    assert ways_of([4], num_layers=4, num_draft_tokens=3) == [full]


def test_an_answer_ends_before_the_first_stop_text(subject: EvaluatedModel, records: list[Record]) -> None:
    whole = records[2].detail["answers"]["autoregressive 4"]
    (record,) = _run(subject, _items(prompts=PROMPTS[2:], stop=("eii", ":ei")))
    assert record.detail["answers"]["autoregressive 4"] == whole[: whole.index(":ei")]


def test_a_prompt_without_room_for_its_answer_is_cut_skipped_or_refused(subject: EvaluatedModel) -> None:
    long = "the end of the END " * 40
    items = _items(prompts=[PROMPTS[0], long])
    short, cut = _run(subject, items)
    tokens = subject.tokenizer(long)["input_ids"][-(96 - 12) :]
    alone = decode(
        subject.decoder, tokens, strategy="autoregressive", settings=DecodingSettings(max_new_tokens=12)
    ).tokens
    assert cut.detail["answers"]["autoregressive 4"] == continuation(subject.tokenizer, tokens, alone)
    assert (short.truncated, cut.truncated) == (False, True)
    _, skipped = _run(subject, items, replace(SETTINGS, on_long="skip"))
    assert skipped.scores == ()
    with pytest.raises(DataError, match=r"file, row 2: got a prompt of \d+ tokens, allowed up to 84, .*on_long=skip"):
        _run(subject, items, replace(SETTINGS, on_long="error"))
    with pytest.raises(DataError, match=r"file, row 2: got a prompt of \d+ tokens, allowed up to 48, "):
        _run(
            subject, items, replace(SETTINGS, on_long="error", max_new_tokens=500)
        )  # the prompt keeps half the context
    with pytest.raises(DataError, match="file, row 1: got an empty prompt"):
        _run(subject, _items(prompts=[""]))


def test_programs_are_run_only_if_the_user_allows_it(subject: EvaluatedModel) -> None:
    task = replace(TASK, score=None, program=lambda text, example: f"{text!r}\nassert {example.prompt!r} != 'x = 1'")
    with pytest.raises(ConfigError, match="allow_running_programs: got False, allowed true for letters"):
        _run(subject, _items(), task=task)
    settings = replace(SETTINGS, allow_running_programs=True)
    passed = [
        score.values
        for record in _run(subject, _items(prompts=PROMPTS[:2]), settings, task=task)
        for score in record.scores
    ]
    assert passed == [{"pass@1": 1.0}] * 5 + [{"pass@1": 0.0}] * 5


def _scripted(answers: Mapping[tuple[int, ...], Mapping[int | None, list[int]]]) -> Callable[..., list[DecodingResult]]:
    """A stand-in for `decode_batch` that gives the answer of each prompt at each exit."""

    def decode_batch(
        decoder: object, prompts: Sequence[Sequence[int]], *, strategy: str, settings: DecodingSettings
    ) -> list[DecodingResult]:
        return [
            DecodingResult(
                tokens=answers[tuple(prompt)][settings.exit_layer if strategy == "early_exit" else None],
                stop_reason="eos",
                seconds_prefill=0.0,
                seconds_decode=0.0,
                steps=(),
            )
            for prompt in prompts
        ]

    return decode_batch


def test_topv2_is_scored_as_the_callback_scores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_topv2(tmp_path)
    examples, tokenizer = data.generation_examples("test", 1000), data.tokenizer
    end = tokenizer.eos_token_id

    def tokens(text: str) -> list[int]:
        return [*tokenizer(f" {text}", add_special_tokens=False)["input_ids"], end]

    answers: dict[tuple[int, ...], dict[int | None, list[int]]] = {}
    for number, example in enumerate(examples):
        right, of_frame = example.reference, example.reference.replace(" weather in", "").replace(" remind", "")
        full, early = [(right, of_frame), (right, "no parse"), (of_frame, "[IN:A ]"), (right, right)][number % 4]
        answers[tuple(example.prompt)] = {None: tokens(full), 2: tokens(early)}
    for module in (alternation, generation):
        monkeypatch.setattr(module, "decode_batch", _scripted(answers))
    decoder = counting_decoder(max_length=512)
    limits: dict[str, Any] = {"num_draft_tokens": (), "max_new_tokens": 128, "time_limit_seconds": 60.0}
    plan = ParsePlan(num_layers=4, exit_layers=(2,), eos_token_ids=(end,), batch_size=4, **limits)
    groups = [example.group for example in examples]
    metrics = {way: ParseExactMatch(groups, target_format="parse") for way in plan.ways}
    evaluate_parses(decoder, examples, [], plan=plan, answer=data.answer, metrics=metrics)
    expected = collect_results(metrics, [])

    items = read_items(TOPV2, str(tmp_path / "topv2"))
    settings = EvaluationSettings(num_draft_tokens=0)
    scored = [*run_generation(EvaluatedModel(decoder, tokenizer, (end,)), TOPV2, items, (2, 4), settings)]
    assert len(scored) == len(examples)
    for result in expected:
        by_group = {None: result.scores.overall, **result.scores.by_group}
        for group, score in by_group.items():
            own = [
                each.values
                for record in scored
                if group in (None, record.group)
                for each in record.scores
                if (each.strategy, each.exit_layer) == (result.way.strategy, result.way.exit_layer)
            ]
            assert len(own) == score.num_examples
            for name in ("exact_match", "frame_match", "well_formed"):
                assert sum(values[name] for values in own) / len(own) == pytest.approx(getattr(score, name))
    assert 0 < expected[1].scores.overall.exact_match < expected[0].scores.overall.exact_match < 1
