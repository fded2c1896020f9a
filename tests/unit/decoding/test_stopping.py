"""Stop strings: the first token that completes one ends the sequence, however the tokens arrive."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.decoding.settings import DecodingSettings
from app.decoding.stopping import StopStrings
from app.errors import ConfigError
from tests.support.decoding import decode
from tests.support.fake_decoder import counting_decoder
from tests.support.tokenizers import byte_fallback, byte_level, llama

TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback(), "llama": llama()}


def slow_stop(tokenizer, tokens, strings, prompt=()):
    """The same by decoding everything anew for every token."""
    before = tokenizer.decode(list(prompt))
    for stop in range(1, len(tokens) + 1):
        if any(string in tokenizer.decode([*prompt, *tokens[:stop]])[len(before) :] for string in strings):
            return stop
    return None


def fast_stop(condition, tokens, sizes, prompt=()):
    """Tokens arrive in rounds of these sizes."""
    stop = 0
    while stop < len(tokens):
        size = next(sizes)
        begin, stop = stop, min(stop + size, len(tokens))
        if (kept := condition(prompt, tokens[:stop], stop - begin)) is not None:
            return kept
    return None


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=150)
def test_stops_where_decoding_everything_for_every_token_would(kind, data):
    tokenizer = TOKENIZERS[kind]
    some = st.integers(0, len(tokenizer) + 1)
    prompt = tokenizer(data.draw(st.text(alphabet="the n😀é\n", max_size=9)))["input_ids"]
    text = data.draw(st.text(alphabet="the nd😀🙈你é\nE", max_size=15))
    tokens = tokenizer(text)["input_ids"] + data.draw(st.lists(some, max_size=30))
    whole = tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]
    begin = data.draw(st.integers(0, max(len(whole) - 1, 0)))
    of_the_text = whole[begin : begin + data.draw(st.integers(1, 6))]
    strings = [string for string in (of_the_text, data.draw(st.text(alphabet="the \nEN😀", max_size=4))) if string]
    strings = [string for string in strings if "\N{REPLACEMENT CHARACTER}" not in string] or ["the"]
    sizes = iter(lambda: data.draw(st.integers(1, 17)), None)
    stopped = fast_stop(StopStrings(tokenizer, strings), tokens, sizes, prompt)
    assert stopped == slow_stop(tokenizer, tokens, strings, prompt)


def test_a_string_may_begin_with_the_space_that_decoding_drops_at_the_beginning_of_a_text():
    tokenizer = TOKENIZERS["llama"]
    prompt, tokens = tokenizer("x =")["input_ids"], tokenizer("def", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == "def"
    assert StopStrings(tokenizer, [" def"])(prompt, tokens, 1) == 1


def test_a_string_may_span_rounds_and_end_within_one():
    tokenizer = TOKENIZERS["byte_level"]
    tokens = tokenizer("abc the end of it")["input_ids"]
    expected = slow_stop(tokenizer, tokens, ["e end o"])
    assert 3 < expected < len(tokens)
    for size in (1, 2, len(tokens)):
        assert fast_stop(StopStrings(tokenizer, ["e end o"]), tokens, iter([size] * 99)) == expected
    # Negative control: what only the latest tokens hold is not enough.
    assert "e end o" not in tokenizer.decode(tokens[expected - 1 : expected])


def test_a_string_may_name_a_special_token():
    tokenizer = TOKENIZERS["byte_level"]
    tokens = [*tokenizer("ab")["input_ids"], 0, *tokenizer("cd")["input_ids"]]
    assert StopStrings(tokenizer, ["<|endoftext|>"])([1], tokens, len(tokens)) == tokens.index(0) + 1


def test_ids_beyond_the_tokenizers_vocabulary_do_not_hide_a_string():
    tokenizer = TOKENIZERS["byte_level"]
    tokens = tokenizer("x of the")["input_ids"] + [len(tokenizer)] * 30 + tokenizer(" end")["input_ids"]
    stop = slow_stop(tokenizer, tokens, ["x of the e"])
    assert stop is not None
    assert StopStrings(tokenizer, ["x of the e"])([1], tokens, len(tokens)) == stop


def test_work_does_not_grow_with_the_text():
    lengths = []

    class Counting:
        def convert_ids_to_tokens(self, token):
            return TOKENIZERS["byte_level"].convert_ids_to_tokens(token)

        def decode(self, tokens, **options):
            lengths.append(len(tokens))
            return TOKENIZERS["byte_level"].decode(tokens, **options)

    condition = StopStrings(Counting(), ["\n\n\n"])
    tokens = TOKENIZERS["byte_level"]("the end " * 200)["input_ids"]
    assert condition(tokens, tokens, 5) is None
    assert lengths == [4] * 5


@pytest.mark.parametrize(
    "strings", [[], [""], ["a", ""], ["\N{REPLACEMENT CHARACTER}"], [b"\x80".decode(errors="surrogateescape")]]
)
def test_strings_that_cannot_end_anything_are_refused(strings):
    with pytest.raises(ConfigError, match=r"stop: got .*, allowed"):
        StopStrings(TOKENIZERS["byte_level"], strings)


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3, 7])
def test_the_engine_keeps_the_same_tokens_whatever_the_rounds_are(num_draft_tokens):
    tokenizer, fake = TOKENIZERS["byte_level"], counting_decoder(vocab_size=300, misses=(70, 75))
    prompt = [60]  # then 61, 62, ...: the fake counts
    ends_with = tokenizer.decode([80, 81])
    settings_ = DecodingSettings(
        max_new_tokens=40, exit_layer=2, num_draft_tokens=num_draft_tokens, stop=StopStrings(tokenizer, [ends_with])
    )
    result = decode(fake, prompt, strategy="self_speculative", settings=settings_)
    assert (result.tokens, result.stop_reason) == (list(range(61, 82)), "stop")
