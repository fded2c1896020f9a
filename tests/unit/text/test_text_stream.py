"""Text from tokens one by one: nothing lost, nothing changed later, and no more work for a longer text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from app.text.text_stream import TextStream, continuation, prompt_text
from tests.support.tokenizers import TEXTS, byte_fallback, byte_level, llama

TOKENIZERS = {
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(),
    "llama": llama(),
    "no prefix": llama(add_prefix_space=False),
}
each_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


def pushed(tokenizer, tokens, prompt=()) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.push(token) for token in tokens), stream.rest()]


@each_tokenizer
@given(data=st.data())
@settings(max_examples=150)
def test_pieces_make_up_the_decoded_text_of_any_tokens(kind, data):
    tokenizer = TOKENIZERS[kind]
    beyond_the_vocabulary = len(tokenizer) + 2
    prompt, tokens = (data.draw(st.lists(st.integers(0, beyond_the_vocabulary), max_size=size)) for size in (20, 40))
    assert "".join(pushed(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(pushed(tokenizer, tokens, prompt)) == continuation(tokenizer, prompt, tokens)


@each_tokenizer
@given(text=st.text(alphabet="the nd😀🙈你é\n•", max_size=20))
@settings(max_examples=50)
def test_pieces_of_a_text_never_hold_a_half_character(kind, text):
    tokenizer = TOKENIZERS[kind]
    pieces = pushed(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(pieces) in (text, text.removeprefix(" "))  # at the beginning of a text Llama's knows no lone space
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


@pytest.mark.parametrize("kind", ["byte_fallback", "llama"])
def test_a_continuation_keeps_the_space_that_decoding_drops_at_the_beginning_of_a_text(kind):
    tokenizer = TOKENIZERS[kind]
    prompt, text = tokenizer("the def f(x):\n")["input_ids"], "    return x 🙈"
    new = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    new = new[new.index(prompt[-1]) + 1 :]
    assert tokenizer.decode(new) == text[1:]  # the negative control: an IndentationError
    assert continuation(tokenizer, prompt, new) == "".join(pushed(tokenizer, new, prompt)) == text


def test_no_space_before_punctuation_is_tidied_away():
    tidy = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS["byte_level"].backend_tokenizer,
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )
    prompt, new = tidy("x")["input_ids"], tidy(" = [1 , 2]")["input_ids"]
    assert tidy.decode(new) == " = [1, 2]"  # the negative control
    assert continuation(tidy, prompt, new) == "".join(pushed(tidy, new, prompt)) == " = [1 , 2]"


@each_tokenizer
def test_the_text_of_a_prompt_ends_with_a_whole_character(kind):
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer("end 🙈")["input_ids"]
    assert prompt_text(tokenizer, tokens) == "end 🙈"
    assert prompt_text(tokenizer, tokens[:-1]) == "end "
    assert "\N{REPLACEMENT CHARACTER}" in tokenizer.decode(tokens[:-1])  # the negative control


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
        pushed(counting, tokens, prompt=tokens * 5)
        assert max(counting.lengths) < 12
        assert len(counting.lengths) <= 2 * len(tokens) + 2


def test_a_preview_changes_nothing():
    tokenizer = TOKENIZERS["byte_level"]
    stream, tokens = TextStream(tokenizer), tokenizer("the 🙈 end 你好")["input_ids"]
    shown = ""
    for idx, token in enumerate(tokens):
        shown += stream.push(token)
        assert (shown + stream.preview(tokens[idx + 1 :])) == "the 🙈 end 你好"
