"""Documents -> tokens -> packed rows, built once and kept on disk under a key of everything they depend on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from app.errors import DataError
from datamodules.packing import PackedRows, pack_documents
from datamodules.sources import Document, RawFile, Source, fingerprint, read_documents, read_files
from datamodules.tokenizers import encode_documents, load_tokenizer, train_byte_level_bpe, training_sample

log = logging.getLogger(__name__)

Split = Literal["train", "validation"]

_CODE_VERSION = 1  # raise it when the same settings and files give other rows
_TRAINING_BYTES = 4_000_000  # enough for the merges of a small vocabulary, in about a second
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """What the content of a store depends on, beside the files; the datamodule says what each means."""

    sources: tuple[Source, ...]
    seq_len: int
    validation_share: float
    vocab_size: int
    tokenizer: str | None
    max_bad_share: float


@dataclass(frozen=True)
class TokenStore:
    """Tokenizer and packed rows; `rows[split]` holds one `PackedRows` for each source."""

    key: str
    tokenizer: Any  # transformers.PreTrainedTokenizerFast
    rows: dict[Split, list[PackedRows]]


def open_store(settings: StoreSettings, *, cache_dir: Path) -> TokenStore:
    """Load the store for `settings` and the files as they are now; build it if there is none or it is damaged.

    Several processes may do so at once: a store appears in `cache_dir` whole or not at all.

    Raises:
        DataError: A source has no usable documents, or none on the training side.
        ConfigError: The tokenizer cannot be used.
    """
    files = [read_files(source) for source in settings.sources]
    tokenizer = None if settings.tokenizer is None else load_tokenizer(settings.tokenizer)
    key = _key(settings, files, tokenizer)
    folder = cache_dir / key
    if folder.is_dir() and not _is_intact(folder):
        log.warning("cached data in %s is damaged: building it again", folder)
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_dir():
        log.info("building data in %s", folder)
        _build(settings, files, tokenizer, folder=folder)
    return _load(folder, num_sources=len(files))


def _key(settings: StoreSettings, files: Sequence[Sequence[RawFile]], tokenizer: Any) -> str:
    parts = asdict(replace(settings, sources=())) | {
        "code_version": _CODE_VERSION,
        "kinds": [source.kind for source in settings.sources],
        "files": [fingerprint(of_source) for of_source in files],
    }
    if tokenizer is not None:  # its content counts, not the place it lies in
        backend = tokenizer.backend_tokenizer.to_str()
        parts |= {"vocab_size": None, "tokenizer": [sha256(backend.encode()).hexdigest(), tokenizer.eos_token_id]}
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _build(settings: StoreSettings, files: Sequence[Sequence[RawFile]], tokenizer: Any, *, folder: Path) -> None:
    sides: list[dict[Split, list[str]]] = [
        _split(
            read_documents(source, of_source, max_bad_share=settings.max_bad_share),
            source=source,
            share=settings.validation_share,
        )
        for source, of_source in zip(settings.sources, files, strict=True)
    ]
    if tokenizer is None:
        sample = training_sample([side["train"] for side in sides], max_bytes=_TRAINING_BYTES)
        tokenizer = train_byte_level_bpe(sample, vocab_size=settings.vocab_size)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as temporary:
        content = Path(temporary) / "store"
        tokenizer.save_pretrained(content / "tokenizer")
        for index, side in enumerate(sides):
            for split, texts in side.items():
                documents = encode_documents(tokenizer, texts)
                packed = pack_documents(documents, seq_len=settings.seq_len, eos_id=tokenizer.eos_token_id)
                np.savez(content / f"{index}-{split}.npz", **vars(packed))
        (content / _MANIFEST).write_text(json.dumps(_checksums(content)))
        try:
            content.replace(folder)
        except OSError:
            if not folder.is_dir():  # else another process built the same store first
                raise


def _split(documents: Sequence[Document], *, source: Source, share: float) -> dict[Split, list[str]]:
    sides: dict[Split, list[str]] = {"train": [], "validation": []}
    for document in documents:
        sides["validation" if document.is_held_out(share=share) else "train"].append(document.text)
    if not sides["train"]:
        raise DataError(
            f"source {source.name!r} ({source.root}): all {len(documents)} documents fell to validation; "
            "lower validation_share or add documents"
        )
    if not sides["validation"]:
        log.warning("source %r: none of its %d documents fell to validation", source.name, len(documents))
    return sides


def _load(folder: Path, *, num_sources: int) -> TokenStore:
    rows: dict[Split, list[PackedRows]] = {split: [] for split in get_args(Split)}
    for split, of_split in rows.items():
        for index in range(num_sources):
            with np.load(folder / f"{index}-{split}.npz") as arrays:
                of_split.append(PackedRows(**arrays))
    return TokenStore(folder.name, load_tokenizer(os.fspath(folder / "tokenizer")), rows)


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != _MANIFEST)
    return {file.relative_to(folder).as_posix(): sha256(file.read_bytes()).hexdigest() for file in files}


def _is_intact(folder: Path) -> bool:
    try:
        expected = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return bool(expected == _checksums(folder))
