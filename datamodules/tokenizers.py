"""Text to token ids: train a small byte-level BPE, or use a tokenizer that exists; encode documents in bulk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from app.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte, and END_OF_TEXT

_DOCUMENTS_PER_CALL = 256  # bounds the memory that encodings take beside the ids


def train_byte_level_bpe(texts: Iterator[str] | Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; any text survives encoding and decoding unchanged.

    Args:
        texts: What to learn merges from; the same texts give the same tokenizer.
        vocab_size: Upper bound, at least `MIN_VOCAB_SIZE`; texts too small for it give fewer tokens.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def load_tokenizer(path: str) -> Any:  # transformers.PreTrainedTokenizerFast
    """Load the tokenizer in the local folder `path`.

    Raises:
        ConfigError: There is none, or it is not a fast tokenizer with an end-of-text token.
    """
    if not (Path(path) / "tokenizer_config.json").is_file():
        raise ConfigError(
            "tokenizer",
            got=path,
            allowed="a folder with tokenizer_config.json",
            fix="save one there with tokenizer.save_pretrained, or leave tokenizer out to train one",
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ConfigError(
            "tokenizer", got=path, allowed="a fast tokenizer with an eos_token", fix="choose another tokenizer"
        )
    return tokenizer


def training_sample(texts_by_source: Sequence[Sequence[str]], *, max_bytes: int) -> Iterator[str]:
    """Up to `max_bytes` of text in equal parts from every source, from documents spread over the whole source."""
    share = max_bytes / len(texts_by_source)
    for texts in texts_by_source:
        total = sum(len(text.encode()) for text in texts)
        stride = max(1, round(total / share))
        remaining = share
        for text in texts[::stride]:
            if remaining <= 0:
                break
            yield text[: int(remaining) + 1]
            remaining -= len(text.encode())


def encode_documents(tokenizer: Any, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
    """Token ids of each text, without special tokens; one spelled out in a text is encoded as ordinary text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # the caller's keeps its settings
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [
        np.asarray(encoding.ids, dtype=np.int32)
        for start in range(0, len(texts), _DOCUMENTS_PER_CALL)
        for encoding in backend.encode_batch_fast(
            list(texts[start : start + _DOCUMENTS_PER_CALL]), add_special_tokens=False
        )
    ]
