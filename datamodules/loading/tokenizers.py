"""Text to token ids: a tokenizer trained or loaded, told from others by a fingerprint, and documents encoded."""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from app.errors import ConfigError
from app.model_files.open import open_tokenizer
from app.text.text_tokens import around
from datamodules.loading.cache import cached

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte, and END_OF_TEXT
MAX_VOCAB_SIZE = 2**20  # training allocates memory for the whole vocabulary at once

_TEXTS_A_CALL = 256  # bounds the memory that encodings take beside the ids


def train_byte_level_bpe(texts: Iterator[str] | Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which encodes and decodes any text without loss; equal texts give equal tokenizers.

    Small texts give fewer tokens than `vocab_size`, which is `MIN_VOCAB_SIZE` to `MAX_VOCAB_SIZE`.
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
    return _wrap(backend)


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def trained_tokenizer(texts: Sequence[str], *, vocab_size: int, cache_dir: Path) -> PreTrainedTokenizerFast:
    """Do as `train_byte_level_bpe`, but train only once for the same texts and size."""
    key = sha256(f"{vocab_size}".encode())
    for text in texts:
        key.update(sha256(text.encode()).digest())

    def train() -> bytes:
        backend: str = train_byte_level_bpe(texts, vocab_size=vocab_size).backend_tokenizer.to_str()
        return backend.encode()

    content = cached(cache_dir / f"tokenizer-{key.hexdigest()[:16]}.bin", train)
    return _wrap(Tokenizer.from_str(content.decode()))


def load_tokenizer(path: str) -> Any:  # transformers.PreTrainedTokenizerFast
    """Load the tokenizer of a model or folder; ConfigError if it has none that is fast and has an end-of-text token."""
    tokenizer = open_tokenizer(path, field="tokenizer")
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ConfigError(
            "tokenizer",
            got=path,
            allowed="a fast tokenizer with an eos_token",
            fix="set tokenizer.eos_token to one of its tokens, save_pretrained it, and name that folder",
        )
    return tokenizer


_fingerprints: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()  # with the number of tokens at that time


def fingerprint(tokenizer: Any) -> str:
    """Return a hash of all that decides which ids a text gets; computed once, and again after tokens were added.

    Whether the tokenizer cuts and pads is left out, since any call may change that.
    """
    size, found = _fingerprints.get(tokenizer, (-1, ""))
    if size != len(tokenizer):
        backend = tokenizer.backend_tokenizer
        plain = backend if backend.truncation is None and backend.padding is None else _uncut(tokenizer)
        found = sha256(plain.to_str().encode()).hexdigest()[:16]
        _fingerprints[tokenizer] = len(tokenizer), found
    return found


class Encoder:
    """Encode texts; a special token that is spelled out in one is ordinary text, and none is cut or padded.

    A document begins with the tokens `before`, as the (fast) tokenizer begins texts, and ends with the end-of-text
    token `end`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = _uncut(tokenizer)
        self._backend.encode_special_tokens = True
        self.before, self.end = around(tokenizer).before, int(tokenizer.eos_token_id)

    def __call__(self, documents: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        return [np.fromiter((*self.before, *ids, self.end), dtype=np.int32) for ids in self.inside(documents)]

    def inside(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yield the token ids of each text, without `before` and `end`."""
        for start in range(0, len(texts), _TEXTS_A_CALL):
            some = list(texts[start : start + _TEXTS_A_CALL])
            yield from (encoding.ids for encoding in self._backend.encode_batch_fast(some, add_special_tokens=False))


def _uncut(tokenizer: Any) -> Tokenizer:
    """Return a copy of the backend that neither cuts nor pads; the tokenizer keeps its settings."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend
