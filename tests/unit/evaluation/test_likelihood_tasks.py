"""Choices and windows are scored by hand-made tables and by plain transformers; long prompts follow the policy."""

import math

import pytest
import torch

from app.errors import DataError, NotFiniteError
from app.evaluation.encoding import ExampleEncoder
from app.evaluation.evaluate import prepare
from app.evaluation.likelihood_tasks import accuracies, run_choices, run_windows
from app.evaluation.records import EvaluatedModel, EvaluationSettings
from app.evaluation.rows import Item
from app.evaluation.task import ChoiceExample
from app.evaluation.tasks import TASKS
from app.spans.decoder import SpanDecoder
from tests.support.tiny_models import tiny_llama
from tests.support.tokenizers import byte_level, llama

TEXTS = ["the end of the END, then", "x = 1 then more", "naïve café"]


@pytest.fixture(scope="module")
def subject():
    return EvaluatedModel(SpanDecoder(tiny_llama(vocab_size=330, max_length=48)), byte_level(), ())


def _items(*examples):
    return [Item(row, "", f"file, row {row + 1}", example) for row, example in enumerate(examples)]


def _question(text, *choices, answer=0):
    return ChoiceExample(text, choices or (" no", " yes indeed"), answer)


def _run(subject, items, *, exits=(2, 4), run=run_choices, task="boolq", **settings):
    with torch.no_grad():
        return list(run(subject, TASKS[task], items, exits, EvaluationSettings(**settings)))


@pytest.mark.parametrize(
    ("logs", "answer", "acc", "acc_norm"),
    [  # of choices " ab" (2 bytes), " abcd" (4 bytes) and " é" (2 bytes)
        ((-1.0, -2.0, -9.0), 0, 1, 1),  # -0.5, -0.5, -4.5 a byte: among equals the first one
        ((-1.0, -2.0, -9.0), 1, 0, 0),
        ((-1.0, -1.9, -9.0), 1, 0, 1),
        ((-2.0, -2.0, -2.0), 0, 1, 0),  # -1, -0.5, -1
        ((-2.0, -2.0, -2.0), 1, 0, 1),
        ((-9.0, -9.0, -1.0), 2, 1, 1),
        ((-4.0, -6.1, -3.0), 2, 1, 1),  # -2, -1.525, -1.5: a character of two bytes counts as two
    ],
)
def test_accuracies_by_hand(logs, answer, acc, acc_norm):
    example = ChoiceExample("", (" ab", " abcd", " é"), answer)
    assert accuracies(example, logs) == {"acc": acc, "acc_norm": acc_norm}


def test_records_tell_each_exit_and_do_not_depend_on_the_batch(subject):
    items = _items(*(_question(text * 2, answer=n % 2) for n, text in enumerate(TEXTS)))
    whole = sorted(_run(subject, items), key=lambda record: record.row)
    single = sorted(_run(subject, items, batch_size=1), key=lambda record: record.row)
    for record, alone in zip(whole, single, strict=True):
        assert [(score.exit_layer, score.strategy) for score in record.scores] == [(2, "likelihood"), (4, "likelihood")]
        assert record.scores == alone.scores
        assert (record.task, record.weight, record.chance, record.truncated) == ("boolq", 1.0, 0.5, False)
        logs = record.detail["log_likelihoods"]
        assert record.detail["answer"] == record.row % 2
        for exit_layer, values in alone.detail["log_likelihoods"].items():
            assert logs[exit_layer] == pytest.approx(values, abs=1e-4)
        assert logs["2"] != pytest.approx(logs["4"], abs=0.1)


def test_long_prompts_come_first_within_their_group(subject):
    texts = {"a": "x", "b": "then more", "c": "the end of the"}
    items = [Item(row, "g" * (name == "a"), "", _question(text)) for row, (name, text) in enumerate(texts.items())]
    assert [record.row for record in _run(subject, items, batch_size=1)] == [2, 1, 0]


def test_prompts_longer_than_the_context_are_cut_skipped_or_refused(subject):
    items = _items(_question("x" * 60 + TEXTS[0]), _question(TEXTS[1]))
    cut, whole = _run(subject, items)
    assert (cut.truncated, whole.truncated) == (True, False)
    ids = [subject.tokenizer(items[0].example.context + choice)["input_ids"] for choice in (" no", " yes indeed")]
    longest = len(ids[1])
    kept = subject.tokenizer.decode(
        ids[1][longest - 49 : len(subject.tokenizer(items[0].example.context)["input_ids"])]
    )
    (fitting,) = _run(subject, _items(_question(kept)))
    assert cut.detail["log_likelihoods"]["4"] == pytest.approx(fitting.detail["log_likelihoods"]["4"], abs=1e-4)
    skipped, done = _run(subject, items, on_long="skip")
    assert (skipped.row, skipped.scores, len(done.scores)) == (0, (), 2)
    with pytest.raises(
        DataError, match=r"file, row 1: got a prompt of \d+ tokens, allowed up to 48, the model's context"
    ):
        _run(subject, items, on_long="error")
    with pytest.raises(DataError, match=r"its choices alone are too long, and only on_long=skip goes on"):
        _run(subject, _items(_question("x", " no", " x" * 60)))


def test_a_beginning_that_the_tokenizer_puts_there_stays_when_the_rest_is_cut():
    encoder = ExampleEncoder(tokenizer := llama())
    (item,) = _items(_question("x" * 30, " a", " bc"))
    ids = tokenizer("x" * 30 + " bc")["input_ids"]
    whole = encoder.choices(item, max_length=64, on_long="error")
    assert whole.choices[1] == (ids, len(ids) - 2 - (len(ids) - len(tokenizer("x" * 30)["input_ids"]) - 2))
    cut = encoder.choices(item, max_length=10, on_long="truncate_left")
    assert cut.choices[1].tokens == [ids[0], *ids[-10:]]
    assert len(cut.choices[1].tokens) - cut.choices[1].start == len(ids) - whole.choices[1].start
    assert encoder.choices(item, max_length=len(ids) - 1, on_long="error") is not None  # the last token is not run


def test_spaces_at_the_end_of_a_context_belong_to_the_choice():
    encoder = ExampleEncoder(byte_level())
    spaced, plain = _items(_question("the end ", "of"), _question("the end", " of"))
    ways = [encoder.choices(item, max_length=64, on_long="error").choices[0] for item in (spaced, plain)]
    assert ways[0] == ways[1]
    (empty,) = _items(ChoiceExample("", ("the",), 0))
    (scored,) = encoder.choices(empty, max_length=64, on_long="error").choices
    tokenizer = byte_level()
    assert scored == ([tokenizer.eos_token_id, *tokenizer("the")["input_ids"]], 1)


def test_perplexity_is_that_of_plain_transformers_over_windows_that_score_each_token_once(subject, tmp_path):
    (tmp_path / "a.txt").write_text(text := "".join(TEXTS) * 3)
    (tmp_path / "b.txt").write_text("then more")
    settings = EvaluationSettings(window=16, batch_size=2)
    task = {"text": str(tmp_path)}
    ((_, _, items),) = prepare(task, settings, tokenizer=subject.tokenizer, max_length=48)
    ids = subject.tokenizer(text)["input_ids"]
    own = [item.example.tokens for item in items if item.group == "a"]
    assert [len(each) for each in own][:-1] == [17] * (len(own) - 1)
    assert own[0][0] == subject.tokenizer.eos_token_id  # stands before the first token, which is scored, too
    assert [token for each in own for token in each[1:]] == ids
    records = _run(subject, items, run=run_windows, task="text", batch_size=2)
    model = subject.decoder._model
    for record, item in zip(records, items, strict=True):
        tokens = torch.tensor([item.example.tokens])
        with torch.no_grad():
            expected = model(tokens, labels=tokens).loss
        assert record.scores[1].values["loss"] == pytest.approx(float(expected), abs=1e-4)
        assert record.weight == len(item.example.tokens) - 1
    limited = prepare(task, EvaluationSettings(window=16, limit=3), tokenizer=subject.tokenizer, max_length=48)
    assert [item.group for item in limited[0].items] == ["a", "a", "b"]  # windows, not documents, are counted
    begun = ExampleEncoder(llama()).windows([Item(0, "", "", TASKS["text"].example(_Row(text="x")))], size=16)
    assert begun[0].example.tokens[0] == llama().bos_token_id


class _Row(dict):
    source = "s"

    def __init__(self, **values):
        super().__init__(values)

    def text(self, column):
        return self[column]


def test_logits_that_are_not_finite_are_an_error_that_names_row_and_exit(subject, monkeypatch):
    def broken(decoder, examples, exit_layers):
        return [[torch.tensor([[-1.0], [math.nan]]) for _ in example] for example in examples]

    monkeypatch.setattr("app.evaluation.likelihood_tasks.log_probabilities", broken)
    with pytest.raises(NotFiniteError, match=r"file, row 1: log-likelihoods of exit 4 are not finite"):
        _run(subject, _items(_question("x")))
