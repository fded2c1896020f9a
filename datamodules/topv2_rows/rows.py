"""Which TOPv2 examples make up the rows of training and evaluation, and the prompts to generate from.

A row is the indices of its examples. Tested by tests/unit/datamodules/test_topv2.py.
"""

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from app.errors import DataError
from app.protocols import GenerationExample
from datamodules.loading.best_fit import best_fit
from datamodules.topv2_rows.files import Split
from datamodules.topv2_rows.store import Examples

_log = logging.getLogger(__name__)


def training_rows(examples: Examples, *, seq_len: int, packed: bool) -> list[list[int]]:
    """Every example of at most `seq_len` tokens, once; `packed` fills rows with several examples of one domain.

    DataError says, here and below, that no example is that short.
    """
    fitting = _fitting(examples, split="train", seq_len=seq_len)
    if not packed:
        return [[index] for index in fitting.tolist()]
    rows: list[list[int]] = []
    for source in np.unique(examples.sources):
        own = fitting[examples.sources[fitting] == source]
        rows += [own[row].tolist() for row in best_fit(examples.lengths[own].tolist(), capacity=seq_len)]
    return rows


def held_out_rows(examples: Examples, *, split: Split, seq_len: int, per_source: int) -> list[list[int]]:
    """At most `per_source` examples of each domain of `split`, each a row, in ascending order of length.

    They are chosen at random once and for all: no other setting changes the choice.
    """
    shuffled = np.asarray(_shuffled(examples))
    candidates = shuffled[np.isin(shuffled, _fitting(examples, split=split, seq_len=seq_len))]
    picked = [candidates[examples.sources[candidates] == source][:per_source] for source in np.unique(examples.sources)]
    rows = np.concatenate(picked)
    return [[index] for index in rows[np.argsort(examples.lengths[rows], kind="stable")].tolist()]


def short_prompts(examples: Examples, *, count: int, length: int) -> list[list[int]]:
    """At most `count` whole prompts of at most `length` token ids, shuffled; a warning says if there are fewer."""
    prompts = [examples.prompt(row) for row in _shuffled(examples) if examples.prompt_lengths[row] <= length]
    if not prompts:
        shortest = examples.prompt_lengths.min()
        raise DataError(f"no prompt of at most {length} tokens; the shortest has {shortest}: raise prompt_length")
    if len(prompts) < count:
        _log.warning("%d prompts asked for, %d have at most %d tokens", count, len(prompts), length)
    return prompts[:count]


def generation_examples(examples: Examples, *, count: int, domains: Sequence[str]) -> list[GenerationExample]:
    """At most `count` shuffled examples with their references, each grouped under its domain."""
    return [
        GenerationExample(examples.prompt(row), examples.references[row], domains[examples.sources[row]])
        for row in _shuffled(examples)[:count]
    ]


def _shuffled(examples: Examples) -> list[int]:
    """All examples in an order that no setting changes, so that results of runs can be compared."""
    order: list[int] = np.random.default_rng(0).permutation(len(examples.sources)).tolist()
    return order


def _fitting(examples: Examples, *, split: Split, seq_len: int) -> npt.NDArray[np.int64]:
    fits = examples.lengths <= seq_len
    if not fits.any():
        raise DataError(f"no {split} row has at most {seq_len} tokens; raise seq_len")
    if not fits.all():
        _log.warning("%d of %d %s rows skipped: longer than seq_len %d", (~fits).sum(), len(fits), split, seq_len)
    return np.flatnonzero(fits)
