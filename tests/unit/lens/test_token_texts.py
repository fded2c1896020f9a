import pytest

from app.lens.token_texts import short_names, token_texts, visible
from tests.support.tokenizers import byte_fallback, byte_level


def test_what_cannot_be_seen_is_shown():
    assert visible(" a\n\tb\u00a0\u200bé") == "␣a↵⇥b⍽<U+200B>é"


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_each_token_of_a_text_has_the_text_that_it_adds(make):
    tokenizer = make()
    tokens = tokenizer("the then", add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, tokens, tokens)
    assert "".join(texts[token] for token in tokens) in ("the␣then", "␣the␣then")
    special = tokenizer.convert_tokens_to_ids("</s>") if make is byte_fallback else 0
    assert token_texts(tokenizer, tokens, [special]) == {special: tokenizer.convert_ids_to_tokens(special)}
    assert token_texts(tokenizer, tokens, [100_000]) == {100_000: "[100000]"}


@pytest.mark.parametrize(("make", "entry"), [(byte_fallback, "<0xE4>"), (byte_level, "ä")])
def test_a_lone_byte_has_no_text_and_is_shown_as_its_entry(make, entry):
    tokenizer = make()
    token = tokenizer.convert_tokens_to_ids(entry)
    assert token_texts(tokenizer, tokenizer("the")["input_ids"], [token]) == {token: entry}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/last.ckpt"], ["last.ckpt"]),
        (["runs/a/checkpoints/last.ckpt"], ["a/last.ckpt"]),
        (["checkpoints/last.ckpt"], ["last.ckpt"]),
        (["runs/a/c/last.ckpt", "runs/b/c/last.ckpt"], ["a", "b"]),
        (["smollm2", "adapted"], ["smollm2", "adapted"]),
        (["m", "m"], ["m", "m again"]),
        (["a/b", "a"], ["b", "a"]),
    ],
)
def test_names_tell_two_models_apart_in_few_words(paths, names):
    assert short_names(paths) == names
