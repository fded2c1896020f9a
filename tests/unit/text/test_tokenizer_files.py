import pytest
from tokenizers import AddedToken

from app.errors import ConfigError
from app.text.tokenizer_files import check_knows_tokens, check_same_tokens
from datamodules.loading.tokenizers import train_byte_level_bpe


def make_tokenizer():
    return train_byte_level_bpe(["def double(x): return 2 * x"] * 30, vocab_size=300)


def extended(*tokens):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(token) for token in tokens])
    return tokenizer


def test_same_tokens_pass_and_so_does_padding_at_the_end_of_either():
    for padding in ((), ("[PAD1]", "<unused2>"), ("<|reserved_special_token_0|>",)):
        check_same_tokens(make_tokenizer(), extended(*padding), got="draft")
        check_same_tokens(extended(*padding), make_tokenizer(), got="draft")


@pytest.mark.parametrize(
    ("target", "draft"),
    [
        ((), ("<|im_start|>",)),
        (("<|im_start|>",), ()),
        (("<a>", "<b>"), ("<b>", "<a>")),
        (("<a>",), ("[PAD1]", "<a>")),
    ],
)
def test_other_tokens_are_refused(target, draft):
    with pytest.raises(ConfigError, match="draft_model: got 'draft', allowed a model with the target's tokenizer"):
        check_same_tokens(extended(*target), extended(*draft), got="draft")


def test_a_tokenizer_may_have_more_tokens_than_the_model_it_feeds_but_no_others():
    def check(tokenizer, own):
        check_knows_tokens(tokenizer, own, got="given", model="hf")

    check(extended("<a>", "<b>"), extended("<a>"))
    check(extended("<a>"), extended("<a>", "[PAD1]"))
    for given, own in ((("<a>",), ("<b>",)), ((), ("<a>",)), (("<b>",), ("[PAD1]", "<b>"))):
        with pytest.raises(ConfigError, match=r"tokenizer: got 'given', allowed the tokenizer of hf.*; the first is"):
            check(extended(*given), extended(*own))


def test_tokenizer_trained_on_other_text_is_refused_with_both_sizes():
    other = train_byte_level_bpe(["something else altogether"] * 30, vocab_size=290)
    with pytest.raises(ConfigError, match=rf"{len(make_tokenizer())} tokens .* and {len(other)} tokens in the draft's"):
        check_same_tokens(make_tokenizer(), other, got="draft")
