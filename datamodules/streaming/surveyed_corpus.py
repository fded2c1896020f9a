"""What a look at the sources gives before training: a tokenizer, held-out rows, and prompts.

All of it is the same on every rank of every run over the same sources.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from app.errors import DataError
from datamodules.loading.rank_share import RankShare
from datamodules.loading.row_settings import RowSettings
from datamodules.loading.tokenizers import Encoder, load_tokenizer, trained_tokenizer
from datamodules.readers.sources import Source
from datamodules.streaming.packing import Row, Tokens
from datamodules.streaming.prompts import held_out_prompts
from datamodules.streaming.survey import Survey, spread_rows, survey

_log = logging.getLogger(__name__)

_TRAINING_BYTES = 4_000_000  # enough for the merges of a small vocabulary, in about a second
_HELD_OUT_BYTES_A_TOKEN = 16  # several times what a token takes: rows come from more documents than they hold


class SurveyedCorpus:
    """Sources, looked at when something is first asked of them.

    Args:
        sources: Named ones.
        settings: Of the rows; `tokenizer` or `vocab_size` tell which tokenizer.
        validation_share: Share of documents held out.
        cache_dir: Where the trained tokenizer is kept.
    """

    def __init__(
        self, sources: Sequence[Source], *, settings: RowSettings, validation_share: float, cache_dir: Path
    ) -> None:
        self._sources, self._settings = sources, settings
        self._validation_share, self._cache_dir = validation_share, cache_dir

    @cached_property
    def tokenizer(self) -> Any:  # transformers.PreTrainedTokenizerFast
        """The one given, or one trained on the sources."""
        if self._settings.tokenizer is not None:
            return load_tokenizer(self._settings.tokenizer)
        sample = [text for found in self._surveys for text in found.training]
        return trained_tokenizer(sample, vocab_size=self._settings.vocab_size, cache_dir=self._cache_dir)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """At most `count` prompts of at most `length` token ids; fewer come with a warning.

        Raises:
            DataError: Nothing is held out.
        """
        prompts = held_out_prompts(self._held_out, count=count, length=length)
        if not prompts:
            raise self._nothing_held_out()
        if len(prompts) < count:
            _log.warning("%d prompts asked for, %d documents held out", count, len(prompts))
        return prompts

    def validation_rows(self, share: RankShare) -> list[tuple[int, Row]]:
        """Index of a source and a row of it, sources in turn; a part as large as every other rank's.

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
            survey(
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
        return [encode(found.held_out) for found in self._surveys]

    def _nothing_held_out(self) -> DataError:
        names = ", ".join(source.name for source in self._sources)
        return DataError(f"no held-out rows in {names}; raise validation_share or add documents")
