from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from app.errors import ConfigError
from datamodules.tokenizers import (
    END_OF_TEXT,
    MIN_VOCAB_SIZE,
    encode_documents,
    load_tokenizer,
    train_byte_level_bpe,
    training_sample,
)

TEXTS = ["the exit layer and the other layer", "def exit(layer): return layer"] * 20
TOKENIZER = train_byte_level_bpe(TEXTS, vocab_size=300)


@given(st.one_of(st.text(), st.binary().map(lambda raw: raw.decode("latin-1"))))
def test_any_text_survives_the_round_trip(text: str) -> None:
    (ids,) = encode_documents(TOKENIZER, [text])
    assert TOKENIZER.decode(ids.tolist()) == text
    assert ids.max(initial=0) < len(TOKENIZER)


def test_training_is_deterministic_and_bounded() -> None:
    again = train_byte_level_bpe(iter(TEXTS), vocab_size=300)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert MIN_VOCAB_SIZE < len(TOKENIZER) <= 300
    assert len(train_byte_level_bpe([], vocab_size=300)) == MIN_VOCAB_SIZE
    assert TOKENIZER.eos_token == END_OF_TEXT


def test_end_of_text_spelled_out_in_a_document_is_ordinary_text() -> None:
    text = f"before {END_OF_TEXT} after"
    (ids,) = encode_documents(TOKENIZER, [text])
    assert TOKENIZER.eos_token_id not in ids
    assert TOKENIZER.decode(ids.tolist()) == text
    assert TOKENIZER.eos_token_id in TOKENIZER(text)["input_ids"]  # the negative control: its own settings stay


def test_encoding_in_calls_of_many_documents_is_encoding_each() -> None:
    texts = [f"layer {index}" for index in range(600)]
    together = encode_documents(TOKENIZER, texts)
    assert [ids.tolist() for ids in together] == [encode_documents(TOKENIZER, [text])[0].tolist() for text in texts]


def test_a_saved_tokenizer_is_loaded_unchanged(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert loaded.eos_token_id == TOKENIZER.eos_token_id


def test_a_missing_tokenizer_names_field_and_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer: got .*nowhere.*save_pretrained"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="eos_token"):
        load_tokenizer(str(tmp_path))


def test_the_training_sample_is_balanced_and_bounded() -> None:
    long, short = ["x" * 100] * 100, ["y" * 10] * 100
    sample = "".join(training_sample([long, short], max_bytes=1000))
    assert 400 <= sample.count("x") <= 501
    assert 400 <= sample.count("y") <= 501
    assert "".join(training_sample([long, short], max_bytes=10**6)) == "".join(long + short)
