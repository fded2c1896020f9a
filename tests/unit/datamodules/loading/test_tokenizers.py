import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from app.errors import ConfigError
from datamodules.loading import tokenizers
from datamodules.loading.tokenizers import (
    END_OF_TEXT,
    MIN_VOCAB_SIZE,
    Encoder,
    fingerprint,
    load_tokenizer,
    train_byte_level_bpe,
    trained_tokenizer,
)
from tests.support.checkpoints import write_checkpoint
from tests.support.tiny_models import tiny_llama

TEXTS = ["the exit layer and the other layer", "def exit(layer): return layer"] * 20
TOKENIZER = train_byte_level_bpe(TEXTS, vocab_size=300)


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return list(Encoder(tokenizer).inside(texts))


@given(st.one_of(st.text(), st.binary().map(lambda raw: raw.decode("latin-1"))))
def test_any_text_survives_the_round_trip(text: str) -> None:
    (ids,) = ids_of(TOKENIZER, [text])
    assert TOKENIZER.decode(ids) == text
    assert max(ids, default=0) < len(TOKENIZER)


def test_training_is_deterministic_and_bounded() -> None:
    again = train_byte_level_bpe(iter(TEXTS), vocab_size=300)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert MIN_VOCAB_SIZE < len(TOKENIZER) <= 300
    assert len(train_byte_level_bpe([], vocab_size=300)) == MIN_VOCAB_SIZE
    assert (TOKENIZER.eos_token, TOKENIZER.eos_token_id) == (END_OF_TEXT, 0)
    rich = train_byte_level_bpe([f"word{number} layer{number}" for number in range(999)], vocab_size=300)
    assert len(rich) == 300
    assert rich.decode(rich("it is n't , or is it ?")["input_ids"]) == "it is n't , or is it ?"


def test_end_of_text_spelled_out_in_a_document_is_ordinary_text() -> None:
    text = f"before {END_OF_TEXT} after"
    (ids,) = ids_of(TOKENIZER, [text])
    assert TOKENIZER.eos_token_id not in ids
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.eos_token_id in TOKENIZER(text)["input_ids"]  # the negative control: its own settings stay


def test_encoding_in_calls_of_many_documents_is_encoding_each() -> None:
    texts = [f"layer {index}" for index in range(600)]
    together = ids_of(TOKENIZER, texts)
    assert together == [ids_of(TOKENIZER, [text])[0] for text in texts]


def test_a_saved_tokenizer_is_loaded_unchanged(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert loaded.eos_token_id == TOKENIZER.eos_token_id


def test_the_tokenizer_of_a_run_is_in_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "last.ckpt", tiny_llama(vocab_size=300), TOKENIZER)
    assert fingerprint(load_tokenizer(checkpoint)) == fingerprint(TOKENIZER)


def test_a_missing_tokenizer_names_field_and_fix(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        with pytest.raises(ConfigError, match=rf"tokenizer: got .*{folder}.*, allowed a"):
            load_tokenizer(str(tmp_path / folder))


def test_a_slow_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = copy.copy(TOKENIZER)
    monkeypatch.setattr(type(slow), "is_fast", False)
    monkeypatch.setattr("app.text.tokenizer_files.AutoTokenizer.from_pretrained", lambda *_, **__: slow)
    with pytest.raises(ConfigError, match="a fast tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="eos_token"):
        load_tokenizer(str(tmp_path))


def test_an_encoder_ends_every_text_and_takes_special_tokens_for_text() -> None:
    encode, texts = Encoder(TOKENIZER), ["the exit", "", f"a {END_OF_TEXT} b"]
    eos = TOKENIZER.eos_token_id
    assert [ids.tolist() for ids in encode(texts)] == [[*ids, eos] for ids in ids_of(TOKENIZER, texts)]
    assert encode(texts)[2].tolist().count(eos) == 1


def test_a_tokenizer_that_adds_cuts_and_pads_by_itself_does_none_of_it_here() -> None:
    tokenizer = train_byte_level_bpe(TEXTS, vocab_size=300)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, 0)]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    assert [len(encoding.ids) for encoding in backend.encode_batch(TEXTS[:2])] == [5, 5]  # the negative control
    expected = ids_of(TOKENIZER, TEXTS)
    assert ids_of(tokenizer, TEXTS) == expected
    assert [ids.tolist() for ids in Encoder(tokenizer)(TEXTS)] == [[0, *ids, 0] for ids in expected]
    assert (backend.truncation["max_length"], backend.padding["length"], backend.encode_special_tokens) == (3, 5, False)


def test_the_cache_is_made_and_written_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only within a folder a file can appear all at once; and where texts are cut matters."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    for texts in (["ab", "c"], ["a", "bc"]):
        trained_tokenizer(texts, vocab_size=300, cache_dir=tmp_path / "a" / "b")
    assert len(list((tmp_path / "a" / "b").iterdir())) == 2


def test_the_same_texts_are_trained_on_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "datamodules")
    first = trained_tokenizer(TEXTS, vocab_size=300, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    again = trained_tokenizer(TEXTS, vocab_size=300, cache_dir=tmp_path)
    assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert (again.eos_token, again.decode(again("the exit")["input_ids"])) == (END_OF_TEXT, "the exit")
    assert caplog.text.count("preparing") == 1
    trained_tokenizer(TEXTS, vocab_size=299, cache_dir=tmp_path)
    trained_tokenizer(TEXTS[1:], vocab_size=300, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    file.write_bytes(file.read_bytes().replace(b"exit", b"exot"))
    mended = trained_tokenizer(TEXTS, vocab_size=300, cache_dir=tmp_path)
    assert mended.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert "is damaged" in caplog.text


def test_a_fingerprint_is_of_the_ids_alone() -> None:
    again = train_byte_level_bpe(TEXTS, vocab_size=300)
    first = fingerprint(again)
    assert first == fingerprint(TOKENIZER) == fingerprint(copy.deepcopy(again))
    assert len(first) == 16
    assert fingerprint(train_byte_level_bpe(TEXTS, vocab_size=270)) != first


def test_cutting_and_padding_are_not_part_of_a_fingerprint() -> None:
    for change in ("enable_truncation", "enable_padding"):
        again = train_byte_level_bpe(TEXTS, vocab_size=300)
        getattr(again.backend_tokenizer, change)(**({"max_length": 4} if change == "enable_truncation" else {}))
        assert again.backend_tokenizer.to_str() != TOKENIZER.backend_tokenizer.to_str()
        assert fingerprint(again) == fingerprint(TOKENIZER)


def test_a_tokenizer_is_hashed_once_and_again_when_it_gets_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []

    def counted(raw: bytes) -> Any:
        hashed.append(raw)
        return hashlib.sha256(raw)

    monkeypatch.setattr(tokenizers, "sha256", counted)
    tokenizer = train_byte_level_bpe(TEXTS, vocab_size=300)
    first = fingerprint(tokenizer)
    assert (fingerprint(tokenizer), len(hashed)) == (first, 1)
    tokenizer.add_tokens(["[IN:GET_WEATHER"])
    assert fingerprint(tokenizer) != first
    fingerprint(tokenizer)
    assert len(hashed) == 2
