"""What a look at the sources gives before training: a tokenizer, held-out rows, and prompts.

All of it is the same on every rank of every run over the same sources. Tested by
tests/unit/datamodules/test_text_code.py and tests/unit/datamodules/streaming/test_survey.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from app.errors import DataError
from datamodules.loading.datamodule import RowSettings
from datamodules.loading.rank_share import RankShare
from datamodules.loading.tokenizers import Encoder, load_tokenizer, trained_tokenizer
from datamodules.readers.sources import Source
from datamodules.streaming.packing import Row, Tokens, split_rows
from datamodules.streaming.survey import Survey

_log = logging.getLogger(__name__)

_TRAINING_BYTES = 4_000_000  # enough for the merges of a small vocabulary, in about a second
_HELD_OUT_BYTES_A_TOKEN = 16  # several times what a token takes, so that rows come from more documents than they hold
_MAX_ROWS_A_DOCUMENT = 4
_ROOM = 16  # tokens a document should have beyond its prompt, so that there is something to continue


class SurveyedCorpus:
    """Sources, of which something is read only when it is first asked for; `settings` choose the tokenizer."""

    def __init__(
        self, sources: Sequence[Source], *, settings: RowSettings, validation_share: float, cache_dir: Path
    ) -> None:
        self._sources, self._settings = sources, settings
        self._validation_share, self._cache_dir = validation_share, cache_dir

    @cached_property
    def tokenizer(self) -> Any:  # transformers.PreTrainedTokenizerFast
        """The tokenizer given, or one trained on the sources."""
        if self._settings.tokenizer is not None:
            return load_tokenizer(self._settings.tokenizer)
        sample = [text for survey in self._surveys for text in survey.training]
        return trained_tokenizer(sample, vocab_size=self._settings.vocab_size, cache_dir=self._cache_dir)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """At most `count` beginnings of held-out documents, of at most `length` token ids; sources take turns.

        Documents with more to continue come first. The longest of the others follow, with shorter prompts. A warning
        says if there are fewer than `count`.

        Raises:
            DataError: Nothing is held out.
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
        """This rank's held-out rows, each with the index of its source; sources take turns, and ranks get equally many.

        Raises:
            DataError: Fewer rows are held out than there are ranks.
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
                validation_share=self._validation_share,
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
    """At most `num_rows` rows of `seq_len` tokens, spread evenly over the documents; long documents give their head."""
    heads = (document[: _MAX_ROWS_A_DOCUMENT * seq_len] for document in documents)
    rows = [packed.row for packed in split_rows(heads, seq_len=seq_len)]
    count = min(num_rows, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _prompts(documents: Sequence[Tokens], *, length: int) -> list[list[int]]:
    texts = [document[:-1] for document in documents]  # without the end-of-text token
    texts.sort(key=lambda text: -min(len(text), length + _ROOM))  # stable: long ones keep their order
    return [text[: max(1, min(length, len(text) - _ROOM))].tolist() for text in texts]
