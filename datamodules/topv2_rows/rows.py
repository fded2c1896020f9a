"""Which TOPv2 examples make up the rows of training and of evaluation; a row is the indices of its examples."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from app.errors import DataError
from datamodules.topv2_rows.files import Split
from datamodules.topv2_rows.length_buckets import pack_rows
from datamodules.topv2_rows.store import Examples

_log = logging.getLogger(__name__)


def training_rows(examples: Examples, *, seq_len: int, packed: bool) -> list[list[int]]:
    """Every example that `seq_len` has room for, once.

    Args:
        examples: Of the training split.
        seq_len: Longest row in tokens.
        packed: Fill rows with several examples of one domain; else each is a row.

    Raises:
        DataError: No example is that short.
    """
    fitting = _fitting(examples, split="train", seq_len=seq_len)
    if not packed:
        return [[index] for index in fitting.tolist()]
    rows: list[list[int]] = []
    for source in np.unique(examples.sources):
        own = fitting[examples.sources[fitting] == source]
        rows += [own[row].tolist() for row in pack_rows(examples.lengths[own].tolist(), capacity=seq_len)]
    return rows


def held_out_rows(examples: Examples, *, split: Split, seq_len: int, per_source: int) -> list[list[int]]:
    """At most `per_source` examples of each domain, in ascending order of length, each a row.

    Args:
        examples: Of the split.
        split: Its name, for messages.
        seq_len: Longest row in tokens.
        per_source: Chosen at random once and for all: no other setting changes the choice.

    Raises:
        DataError: No example is that short.
    """
    fits = np.zeros(len(examples.sources), dtype=bool)
    fits[_fitting(examples, split=split, seq_len=seq_len)] = True
    shuffled = np.asarray(shuffled_examples(examples))
    candidates = shuffled[fits[shuffled]]
    picked = [candidates[examples.sources[candidates] == source][:per_source] for source in np.unique(examples.sources)]
    rows = np.concatenate(picked)
    return [[index] for index in rows[np.argsort(examples.lengths[rows], kind="stable")].tolist()]


def shuffled_examples(examples: Examples) -> list[int]:
    """All of them in an order of their own, which no setting changes: results of runs can be compared."""
    order: list[int] = np.random.default_rng(0).permutation(len(examples.sources)).tolist()
    return order


def _fitting(examples: Examples, *, split: Split, seq_len: int) -> Any:  # [n] int64
    fits = examples.lengths <= seq_len
    if not fits.any():
        raise DataError(f"no {split} row has at most {seq_len} tokens; raise seq_len")
    if not fits.all():
        _log.warning("%d of %d %s rows skipped: longer than seq_len %d", (~fits).sum(), len(fits), split, seq_len)
    return np.flatnonzero(fits)
