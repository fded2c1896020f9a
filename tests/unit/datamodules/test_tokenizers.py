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
    Encoder,
    encode_documents,
    load_tokenizer,
    train_byte_level_bpe,
    trained_tokenizer,
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


def test_an_encoder_ends_every_text_and_takes_special_tokens_for_text() -> None:
    encode, texts = Encoder(TOKENIZER), ["the exit", "", f"a {END_OF_TEXT} b"]
    eos = TOKENIZER.eos_token_id
    assert [ids.tolist() for ids in encode(texts)] == [
        [*ids.tolist(), eos] for ids in encode_documents(TOKENIZER, texts)
    ]
    assert encode(texts)[2].tolist().count(eos) == 1


def test_the_same_texts_are_trained_on_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "datamodules")
    first = trained_tokenizer(TEXTS, vocab_size=300, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    again = trained_tokenizer(TEXTS, vocab_size=300, cache_dir=tmp_path)
    assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert (again.eos_token, again.decode(again("the exit")["input_ids"])) == (END_OF_TEXT, "the exit")
    assert caplog.text.count("training a tokenizer") == 1
    trained_tokenizer(TEXTS, vocab_size=299, cache_dir=tmp_path)
    trained_tokenizer(TEXTS[1:], vocab_size=300, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    file.write_text(file.read_text().replace("exit", "exot"))
    mended = trained_tokenizer(TEXTS, vocab_size=300, cache_dir=tmp_path)
    assert mended.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert "is damaged" in caplog.text
