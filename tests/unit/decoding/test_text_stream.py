"""Text from tokens one by one: nothing lost, nothing changed later, and no more work for a longer text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.decoding.text_stream import TextStream
from tests.support.tokenizers import TEXTS, byte_fallback, byte_level

TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}
each_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


def pushed(tokenizer, tokens) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in tokens), stream.rest()]


@each_tokenizer
@given(data=st.data())
@settings(max_examples=150)
def test_pieces_make_up_the_decoded_text_of_any_tokens(kind, data):
    tokenizer = TOKENIZERS[kind]
    beyond_the_vocabulary = len(tokenizer) + 2
    tokens = data.draw(st.lists(st.integers(0, beyond_the_vocabulary), max_size=40))
    assert "".join(pushed(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


@each_tokenizer
@given(text=st.text(alphabet="the nd😀🙈你é\n•", max_size=20))
@settings(max_examples=50)
def test_pieces_of_a_text_never_hold_a_half_character(kind, text):
    tokenizer = TOKENIZERS[kind]
    pieces = pushed(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@each_tokenizer
def test_tokens_decoded_alone_would_not_do(kind):
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer("the 🙈 end")["input_ids"]
    assert "".join(tokenizer.decode([token]) for token in tokens) != "the 🙈 end"


def test_a_character_comes_with_its_last_byte_and_not_before():
    tokenizer = TOKENIZERS["byte_level"]
    tokens = [tokenizer.convert_tokens_to_ids(piece) for piece in ("a", "Ċ", "ð", "Ł", "ĺ", "Ģ")]
    assert pushed(tokenizer, tokens) == ["a", "\n", "", "", "", "😀", ""]
    assert pushed(tokenizer, tokens[:-1])[-1] == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_within_a_character_do_not_break_it():
    tokenizer = TOKENIZERS["byte_level"]
    first, *others = (tokenizer.convert_tokens_to_ids(piece) for piece in ("ð", "Ł", "ĺ", "Ģ"))
    assert "".join(pushed(tokenizer, [first, *[tokenizer.eos_token_id] * 30, *others])) == "😀"


def test_work_for_a_token_does_not_grow_with_the_text():
    class Counting:
        def __init__(self):
            self.lengths = []

        def __getattr__(self, name):
            return getattr(TOKENIZERS["byte_level"], name)

        def decode(self, tokens, **options):
            self.lengths.append(len(tokens))
            return TOKENIZERS["byte_level"].decode(tokens, **options)

    counting, lone_byte = Counting(), TOKENIZERS["byte_level"].convert_tokens_to_ids("ÿ")
    for tokens in (TOKENIZERS["byte_level"](TEXTS[0] * 5)["input_ids"], [lone_byte] * 300):
        counting.lengths.clear()
        pushed(counting, tokens)
        assert max(counting.lengths) < 12
        assert len(counting.lengths) <= 2 * len(tokens) + 1


def test_a_preview_changes_nothing():
    tokenizer = TOKENIZERS["byte_level"]
    stream, tokens = TextStream(tokenizer), tokenizer("the 🙈 end 你好")["input_ids"]
    shown = ""
    for place, token in enumerate(tokens):
        shown += stream.push(token)
        assert (shown + stream.preview(tokens[place + 1 :])) == "the 🙈 end 你好"
