"""Where texts begin and end in token ids."""

import pytest

from app.text.text_tokens import around, prompt_tokens
from tests.support.tokenizers import byte_fallback, byte_level, llama

BOS, EOS = 1, 2  # of `llama`


@pytest.mark.parametrize(
    ("tokenizer", "before", "after"),
    [
        (byte_level(), [], []),
        (byte_fallback(), [], []),
        (llama(), [BOS], []),
        (llama(add_eos_token=True), [BOS], [EOS]),
        (llama(add_bos_token=False, add_eos_token=True), [], [EOS]),
        (llama(**{"bos_token": "</s>"}, add_eos_token=True), [EOS], [EOS]),
    ],
    ids=["byte-level", "byte fallback", "begins", "begins and ends", "ends", "begins with the end"],
)
def test_a_prompt_begins_as_the_tokenizer_says_and_does_not_end(tokenizer, before, after):
    assert around(tokenizer) == (before, after)
    text = "def the end"
    ids = prompt_tokens(tokenizer, text)
    assert [*ids, *after] == tokenizer(text)["input_ids"]
    assert ids[len(before) :] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_prompt_that_brings_its_own_beginning_gets_no_second_one():
    ids = prompt_tokens(llama(), "<s>def")
    assert (ids[0], ids.count(BOS)) == (BOS, 1)
    assert llama()("<s>def")["input_ids"].count(BOS) == 2  # the negative control
