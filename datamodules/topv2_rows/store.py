"""TOPv2 tokenised: prompt and target of every row, kept in a file that is named by a hash of all they depend on.

Prompt and target are tokenised apart and put together, so that generation starts from the very prompt of training.
"""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken

from app.errors import ConfigError
from app.text.tokenizer_files import tokenizer_from_files, tokenizer_to_files
from app.topv2.semantic_parse import TARGET_FORMATS, TargetFormat
from datamodules.loading.cache import cached
from datamodules.loading.datamodule import RowSettings
from datamodules.loading.tokenizers import MIN_VOCAB_SIZE, Encoder, load_tokenizer, train_byte_level_bpe
from datamodules.topv2_rows.files import AnnotatedUtterance, Split, TsvTable, find_tables, read_rows

_CODE_VERSION = 2  # raise it when the same settings and files give other examples
_CONTENT_SETTINGS = (
    *("domains", "spis", "prompt_template", "target_format", "special_tokens"),
    *("tokenizer", "vocab_size", "max_bad_share"),
)
_ARRAYS = ("tokens", "offsets", "prompt_lengths", "sources")  # of Examples
# What becomes one token when special tokens are on; in a parse, always with the space before it.
_PIECES: dict[TargetFormat, re.Pattern[str]] = {
    "parse": re.compile(r" \[(?:IN|SL):[A-Z0-9_]+| \]"),
    "json": re.compile(r' ?\{"(?:IN|SL):[A-Z0-9_]+":|\}'),
}


@dataclass(frozen=True, kw_only=True)
class StoreSettings(RowSettings):
    """Settings of rows, and those that the content of a store depends on; see `TOPv2DataModule`."""

    path: str
    domains: tuple[str, ...]
    spis: int | None
    prompt_template: str
    target_format: TargetFormat
    special_tokens: bool


@dataclass(frozen=True)
class Examples:
    """The N examples of one split; each is prompt, target and end-of-text token one after the other."""

    tokens: npt.NDArray[np.int32]  # [total], of all examples
    offsets: npt.NDArray[np.int64]  # [N + 1]; where in `tokens` each example starts, and where the last ends
    prompt_lengths: npt.NDArray[np.int32]  # [N]
    sources: npt.NDArray[np.int64]  # [N], indices of domains
    references: list[str]  # N targets as text

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[N]; positions that each example takes in a row, since its last token is only predicted."""
        return np.diff(self.offsets) - 1

    def example(self, index: int) -> npt.NDArray[np.int32]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def prompt(self, index: int) -> list[int]:
        prompt: list[int] = self.example(index)[: self.prompt_lengths[index]].tolist()
        return prompt


@dataclass(frozen=True)
class TaskStore:
    """Tokenizer and examples, under the hash of what they depend on."""

    key: str
    tokenizer: Any  # transformers.PreTrainedTokenizerFast
    examples: dict[Split, Examples]


def open_store(settings: StoreSettings, *, cache_dir: Path) -> TaskStore:
    """Load the store for `settings` and the files as they are now, or build it if there is none or it is damaged.

    DataError says that a file is missing or too much of it is bad, ConfigError that the tokenizer cannot be used or
    `vocab_size` has no room for the special tokens.
    """
    tables: dict[Split, list[TsvTable]] = {
        split: find_tables(settings.path, split=split, domains=settings.domains, spis=settings.spis)
        for split in get_args(Split)
    }
    tokenizer = None if settings.tokenizer is None else load_tokenizer(settings.tokenizer)
    key = _key(settings, tables, tokenizer)
    return _load(cached(cache_dir / f"topv2-{key}.bin", lambda: _build(settings, tables, tokenizer)), key=key)


def _key(settings: StoreSettings, tables: dict[Split, list[TsvTable]], tokenizer: Any) -> str:
    parts = {name: getattr(settings, name) for name in _CONTENT_SETTINGS} | {
        "path": None,  # the content counts, wherever it lies
        "code_version": _CODE_VERSION,
        "files": [table.fingerprint for split in tables for table in tables[split]],
    }
    if tokenizer is not None:
        parts |= {"vocab_size": None, "tokenizer": sha256(repr(tokenizer_to_files(tokenizer)).encode()).hexdigest()}
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _build(settings: StoreSettings, tables: dict[Split, list[TsvTable]], tokenizer: Any) -> bytes:
    read = partial(
        read_rows, encode=TARGET_FORMATS[settings.target_format].encode, max_bad_share=settings.max_bad_share
    )
    rows = {split: list(chain.from_iterable(map(read, of_split))) for split, of_split in tables.items()}
    tokenizer = _fit_tokenizer(settings, rows["train"], tokenizer)
    arrays: dict[str, Any] = {"tokenizer": _text(tokenizer_to_files(tokenizer))}
    for split, own in rows.items():
        examples = _encode(settings, own, tokenizer)
        arrays |= {f"{split}/{name}": getattr(examples, name) for name in _ARRAYS}
        arrays[f"{split}/references"] = _text(examples.references)
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def _fit_tokenizer(settings: StoreSettings, rows: Sequence[AnnotatedUtterance], tokenizer: Any) -> Any:
    """Return the tokenizer given, or one trained on prompts and targets, with special tokens if they are asked for."""
    targets = [_target_text(row) for row in rows]
    found = _PIECES[settings.target_format]
    pieces = sorted(set(chain.from_iterable(map(found.findall, targets)))) if settings.special_tokens else []
    if tokenizer is None:
        if settings.vocab_size < MIN_VOCAB_SIZE + len(pieces):
            raise ConfigError(
                "vocab_size",
                got=settings.vocab_size,
                allowed=f">= {MIN_VOCAB_SIZE + len(pieces)}: every byte, and {len(pieces)} special tokens",
            )
        between = chain.from_iterable(map(found.split, targets)) if pieces else targets
        texts = [*(_prompt_text(settings, row) for row in rows), *filter(None, between)]
        tokenizer = train_byte_level_bpe(texts, vocab_size=settings.vocab_size - len(pieces))
    # They are not "special" in the tokenizer's sense, which would leave them out of decoded text.
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in pieces])
    return tokenizer


def _encode(settings: StoreSettings, rows: Sequence[AnnotatedUtterance], tokenizer: Any) -> Examples:
    encoder = Encoder(tokenizer)
    prompt_ids = encoder.inside([_prompt_text(settings, row) for row in rows])
    target_ids = encoder.inside([_target_text(row) for row in rows])
    prompts = [np.asarray([*encoder.before, *ids], dtype=np.int32) for ids in prompt_ids]
    targets = [np.asarray([*ids, encoder.end], dtype=np.int32) for ids in target_ids]
    pairs = list(zip(prompts, targets, strict=True))
    return Examples(
        tokens=np.concatenate(list(chain.from_iterable(pairs))),
        offsets=np.cumsum([0, *(len(prompt) + len(target) for prompt, target in pairs)]),
        prompt_lengths=np.asarray([len(prompt) for prompt in prompts], dtype=np.int32),
        sources=np.asarray([settings.domains.index(row.domain) for row in rows]),
        references=[row.target for row in rows],
    )


def _prompt_text(settings: StoreSettings, row: AnnotatedUtterance) -> str:
    return settings.prompt_template.replace("{utterance}", row.utterance)


def _target_text(row: AnnotatedUtterance) -> str:
    return f" {row.target}"  # a byte-level BPE takes a word with the space before it


def _load(content: bytes, *, key: str) -> TaskStore:
    with np.load(io.BytesIO(content)) as arrays:
        examples: dict[Split, Examples] = {
            split: Examples(
                references=json.loads(arrays[f"{split}/references"].tobytes()),
                **{name: arrays[f"{split}/{name}"] for name in _ARRAYS},
            )
            for split in get_args(Split)
        }
        return TaskStore(key, tokenizer_from_files(json.loads(arrays["tokenizer"].tobytes())), examples)


def _text(value: object) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
