"""A look at the sources before training: text to train a tokenizer on, held-out rows, and prompts.

Documents come from anywhere in the corpus, in an order that depends on the corpus alone, so every rank of every run
sees the same. Little is read of a large corpus, and all of a small one.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from app.errors import DataError
from datamodules.loading.rank_share import RankShare
from datamodules.loading.tokenizers import Encoder, load_tokenizer, trained_tokenizer
from datamodules.readers import open_reader
from datamodules.readers.sources import Source
from datamodules.streaming.bad_records import BadRecords
from datamodules.streaming.packing import Row, Tokens, split_rows
from datamodules.streaming.source_blocks import StreamSettings

_log = logging.getLogger(__name__)

_Side = Literal["training", "held_out"]

_MAX_BYTES = 2_000_000_000  # read of a source in search of held-out documents
_MIN_DOCUMENTS = {"training": 4, "held_out": 64}  # no document counts for more than its share of so many
_TRAINING_BYTES = 4_000_000  # enough for the merges of a small vocabulary, in about a second
_HELD_OUT_BYTES_A_TOKEN = 16  # several times what a token takes, so that rows come from more documents than they hold
_MAX_ROWS_A_DOCUMENT = 4
_ROOM = 16  # tokens a document should have beyond its prompt, so that there is something to continue


class Survey:
    """Texts of training documents and of held-out ones, read until there are enough of both or the source ends.

    `training` are the training documents.

    Raises:
        DataError: There is no training document, or more than `max_bad_share` of the records are bad.
    """

    def __init__(
        self, source: Source, *, training_bytes: int, held_out_bytes: int, validation_share: float, max_bad_share: float
    ) -> None:
        self._source, self._share = source, validation_share
        self._reader = open_reader(source, min_chunks=1)
        self._records = BadRecords(source.name, max_share=max_bad_share, quiet=True)  # the stream will log them
        self._chunks = np.random.default_rng(0).permutation(self._reader.num_chunks).tolist()  # left to read
        self._start = self._read = 0  # records read of the first of these chunks; characters read in all
        self._missing: dict[_Side, int] = {"training": max(1, training_bytes), "held_out": held_out_bytes}
        self._most = {side: 1 + count // _MIN_DOCUMENTS[side] for side, count in self._missing.items()}
        self._found: dict[_Side, list[str]] = {"training": [], "held_out": []}
        self.training = self._documents("training")
        if not self.training:
            lower = "all fell to validation; lower validation_share or"
            why = lower if self._found["held_out"] else "none could be read;"
            examples = self._records.examples()
            raise DataError(f"source {source.name!r}: no training document, {why} add documents{examples}")

    @property
    def held_out(self) -> list[str]:
        """The held-out documents; most are read when first asked for, so that a resumed run starts without them."""
        return self._documents("held_out")

    def _documents(self, side: _Side) -> list[str]:
        while self._chunks and self._missing[side] > 0:
            self._read_chunk(until=side)
        return self._found[side]

    def _read_chunk(self, *, until: _Side) -> None:
        """Read on to the end of the chunk, or to the last document that is wanted."""
        for record in self._reader.read(self._chunks[0], start=self._start):
            self._start += 1
            if (document := self._records.count(record)) is None:
                continue
            self._read += len(document.text)
            side: _Side = "held_out" if document.is_held_out(share=self._share) else "training"
            if self._missing[side] > 0:
                self._found[side].append(document.text[: self._most[side]] if side == "training" else document.text)
                self._missing[side] -= min(len(document.text.encode()), self._most[side])
            if self._missing[until] <= 0:
                return
        self._records.chunks += 1
        self._chunks, self._start = self._chunks[1:], 0
        self._records.check(complete=not self._chunks)
        if self._read > _MAX_BYTES:
            _log.warning("source %r: few of its documents are held out; raise validation_share", self._source.name)
            self._chunks = []


class SurveyedCorpus:
    """Sources, of which something is read only when it is first asked for; `settings` choose the tokenizer."""

    def __init__(self, sources: Sequence[Source], *, settings: StreamSettings, cache_dir: Path) -> None:
        self._sources, self._settings, self._cache_dir = sources, settings, cache_dir

    @cached_property
    def tokenizer(self) -> Any:  # transformers.PreTrainedTokenizerFast
        if self._settings.tokenizer is not None:
            return load_tokenizer(self._settings.tokenizer)
        sample = [text for survey in self._surveys for text in survey.training]
        return trained_tokenizer(sample, vocab_size=self._settings.vocab_size, cache_dir=self._cache_dir)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Return at most `count` beginnings of held-out documents, of at most `length` token ids; sources take turns.

        Documents with more to continue come first. The longest of the others follow, with shorter prompts. A warning
        says if there are fewer than `count`, and DataError that nothing is held out.
        """
        by_source = [_prompts(documents, length=length) for documents in self._held_out]
        turns = chain.from_iterable(zip_longest(*by_source))
        prompts = [prompt for prompt in turns if prompt is not None][:count]
        if not prompts:
            raise self._nothing_held_out()
        if len(prompts) < count:
            _log.warning("%d prompts asked for, %d documents held out", count, len(prompts))
        return prompts

    def validation_rows(self, share: RankShare) -> list[tuple[int, Row]]:
        """Give this rank its held-out rows with the index of their source: sources take turns, ranks get equally many.

        DataError says that fewer rows are held out than there are ranks.
        """
        seq_len, limit = self._settings.seq_len, self._settings.validation_rows
        turns = zip_longest(*(spread_rows(part, seq_len=seq_len, num_rows=limit) for part in self._held_out))
        rows = [(source, row) for turn in turns for source, row in enumerate(turn) if row is not None]
        if not rows:
            raise self._nothing_held_out()
        count = share.equal_share(len(rows), fix="raise validation_rows or validation_share, or add documents")
        return rows[share.rank * count : (share.rank + 1) * count]

    @cached_property
    def _surveys(self) -> list[Survey]:
        settings = self._settings
        return [
            Survey(
                source,
                training_bytes=0 if settings.tokenizer else _TRAINING_BYTES // len(self._sources),
                held_out_bytes=_HELD_OUT_BYTES_A_TOKEN * settings.validation_rows * settings.seq_len,
                validation_share=settings.validation_share,
                max_bad_share=settings.max_bad_share,
            )
            for source in self._sources
        ]

    @cached_property
    def _held_out(self) -> list[list[Tokens]]:
        encode = Encoder(self.tokenizer)
        return [encode(survey.held_out) for survey in self._surveys]

    def _nothing_held_out(self) -> DataError:
        names = ", ".join(source.name for source in self._sources)
        return DataError(f"no held-out rows in {names}; raise validation_share or add documents")


def spread_rows(documents: Sequence[Tokens], *, seq_len: int, num_rows: int) -> list[Row]:
    """Pack at most `num_rows` rows of `seq_len` tokens, spread evenly over documents; long ones give their head."""
    heads = (document[: _MAX_ROWS_A_DOCUMENT * seq_len] for document in documents)
    rows = [packed.row for packed in split_rows(heads, seq_len=seq_len)]
    count = min(num_rows, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _prompts(documents: Sequence[Tokens], *, length: int) -> list[list[int]]:
    texts = [document[:-1] for document in documents]  # without the end-of-text token
    texts.sort(key=lambda text: -min(len(text), length + _ROOM))  # stable: long ones keep their order
    return [text[: max(1, min(length, len(text) - _ROOM))].tolist() for text in texts]
