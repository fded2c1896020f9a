"""Tokenizers of the kinds whose tokens are not text by themselves, made by the test."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from datamodules.loading.tokenizers import train_byte_level_bpe

TEXTS = ["Grüße aus Köln — 你好 世界 😀😀 naïve café\n" * 3, "the end of the END, then more\n\n\tx = 1 " * 3]


def byte_level(*, vocab_size: int = 330) -> PreTrainedTokenizerFast:
    """As of GPT-2 and Llama 3: every token is some bytes; id 0 is special."""
    return train_byte_level_bpe(TEXTS, vocab_size=vocab_size)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As of Llama 2: whole characters, and single bytes where a character has no entry; decoding drops a space."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehnotxEND\n", "é", "\N{BULLET}"]
    pieces = list(dict.fromkeys(pieces))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("E", "N"), ("EN", "D"), ("▁", "▁")]
    pieces += ["".join(pair) for pair in merges]
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    vocab = {piece: idx for idx, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=merges, unk_token=special["unk_token"], byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in special.values()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, clean_up_tokenization_spaces=False)


def llama(**settings: object) -> LlamaTokenizer:
    """Transformers' own of Llama 1 and 2 and CodeLlama; it puts `<s>` before a text, and a space, which decoding drops.

    Args:
        settings: Of the class: add_eos_token, legacy, add_prefix_space, ...
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("d", "e"), ("de", "f"), ("▁", "def"), ("r", "e"), ("▁", "re"), ("▁", "x")]
    vocab = {piece: idx for idx, piece in enumerate([*pieces, *map("".join, merges)])}
    return LlamaTokenizer(vocab=vocab, merges=merges, **({"add_bos_token": True} | settings))
