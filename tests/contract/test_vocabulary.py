"""`layerskip vocabulary`: the most frequent token ids of texts, stored where drafts find them."""

import json
from collections import Counter

import pytest

from app.generation.loaded_model import load_decoder
from app.model_files.decoding_defaults import DecodingDefaults, read_decoding_defaults, write_decoding_defaults
from tests.support.runs import cli
from tests.support.saved_models import save_model

_TEXTS = ["x = x + 1 if x else 22", "naïve café, x", "for x in xs: yield x"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A model, and files of texts, in the working directory."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    rows = [json.dumps({"text": text, "at": {"body": text}, "number": 1}) for text in _TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join([*rows, "{"]))
    return tmp_path


@pytest.mark.parametrize("options", [[], ["--field", "at.body", "--size", "3"]])
def test_the_ends_and_then_the_most_frequent_ids_are_stored_and_drafted_from(here, monkeypatch, capsys, options):
    assert cli(monkeypatch, "vocabulary", "--model", "model", "--texts", "texts.jsonl", *options) == 0
    printed = capsys.readouterr()
    loaded = load_decoder("model", dtype="auto", device="cpu")
    vocab_size, ends = loaded.decoder.vocab_size, loaded.eos_token_ids
    counts = Counter(token for text in _TEXTS for token in loaded.tokenizer(text)["input_ids"])
    ranked = [*ends, *sorted(set(counts) - {*ends}, key=lambda token: (-counts[token], token))]
    size = int(options[-1]) if options else vocab_size // 8
    stored = loaded.decoder.draft_vocabulary
    assert len(stored) == size
    assert stored[: len(ranked)] == tuple(ranked[:size])
    sixteenth = sum(counts[token] for token in ranked[: vocab_size // 16]) / counts.total()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.out.splitlines()]
    assert [str(vocab_size // 16), "6.2%", f"{sixteenth:.2%}"] in rows
    assert f"{size} (stored)" in printed.out
    assert "texts.jsonl: 1 row skipped; texts.jsonl:4: malformed JSON" in printed.err


def test_what_was_tuned_with_another_list_is_forgotten_but_for_exit_and_drafts(here, monkeypatch):
    tuned = DecodingDefaults(
        strategy="self_speculative",
        exit_layer=1,
        num_draft_tokens=2,
        draft_vocabulary_size=40,
        head=1.0,
        draft_head=0.5,
        measured_speedup=1.5,
    )
    write_decoding_defaults(here / "model", tuned)
    assert cli(monkeypatch, "vocabulary", "--model", "model", "--texts", "texts.jsonl", "--size", "5") == 0
    loaded = load_decoder("model", dtype="auto", device="cpu")
    assert len(loaded.decoder.draft_vocabulary) == 5
    assert read_decoding_defaults(loaded.model) == DecodingDefaults(
        strategy="self_speculative", exit_layer=1, num_draft_tokens=2, head=1.0
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "0"], "size: got 0, allowed [1, "),
        (["--size", "5000"], "size: got 5000, allowed [1, "),
        (
            ["--field", "number"],
            "texts.jsonl holds no text in the field 'number'; texts.jsonl:1: field 'number' is int",
        ),
        (["--texts", "absent.jsonl"], "no folder or file 'absent.jsonl'"),
        (["--model", "texts.jsonl"], "model: got 'texts.jsonl', allowed a Hugging Face directory that can be written"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(here, monkeypatch, capsys, options, said):
    given = ["--model", "model", "--texts", "texts.jsonl", *options]
    assert cli(monkeypatch, "vocabulary", *given) == 2
    assert said in capsys.readouterr().err
    assert not list(here.rglob("draft_vocabulary*"))
