"""A reader of lists, a tokenizer of characters, and settings for them: streams whose every row can be foretold."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from datamodules.readers.records import BadRecord, Document, Record
from datamodules.streaming.packing import Tokens
from datamodules.streaming.source_blocks import StreamSettings

SEQ_LEN = 8


class ListReader:
    """Chunks given as lists of texts; None is a bad record."""

    fingerprint = "lists"

    def __init__(self, chunks: Sequence[Sequence[str | None]]) -> None:
        self._chunks, self.num_chunks = chunks, len(chunks)
        self.opened: list[tuple[int, int]] = []

    def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
        self.opened.append((chunk, start))
        for index, text in enumerate(self._chunks[chunk][start:], start):
            location = f"{chunk}:{index}"
            yield BadRecord(location, "bad") if text is None else Document(location, text, origin=text)


def chunks(*sizes: int, length: int = 5, first: int = 1) -> list[list[str | None]]:
    """Documents of `length` equal characters; each its own character."""
    numbers = iter(range(first, 10_000))
    return [[chr(next(numbers)) * length for _ in range(size)] for size in sizes]


def encode(texts: Sequence[str]) -> list[Tokens]:
    return [np.array([*map(ord, text), 0], dtype=np.int32) for text in texts]


def make_settings(**changes: Any) -> StreamSettings:
    defaults: dict[str, Any] = {
        "seq_len": SEQ_LEN,
        "packing": "split",
        "long_documents": "split",
        "shuffle_megabytes": 40e-6,
        "validation_share": 1e-9,
        "max_bad_share": 0.5,
        "seed": 3,
        "num_lanes": 1,
        "batch_size": 2,
        **{"validation_rows": 1, "vocab_size": 300, "tokenizer": None, "num_workers": 0},
    }
    return StreamSettings(**(defaults | changes))
