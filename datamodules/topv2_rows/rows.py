"""Which TOPv2 examples make up the rows of training and evaluation, the batches of rows, and prompts to generate from.

Shape legend: `B` rows, `T` tokens a row.

A row is the indices of its examples: one or, packed, several of one domain; position ids that restart keep them apart
(see `streaming.packing`). Rows are padded on the right. Under causal attention nothing before the padding sees it, so
in a batch of single examples the position ids simply go on: no mask is needed, and attention keeps its fast path.
Tested by tests/unit/datamodules/topv2_rows/test_batches.py and tests/unit/datamodules/test_topv2.py.
"""

import logging
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from app.errors import DataError
from app.layerskip.early_exit_loss import IGNORE_INDEX
from app.protocols import GenerationExample
from datamodules.loading.best_fit import best_fit
from datamodules.topv2_rows.files import Split
from datamodules.topv2_rows.store import Examples

_log = logging.getLogger(__name__)


def training_rows(examples: Examples, *, seq_len: int, packed: bool) -> list[list[int]]:
    """Make rows of all examples of at most `seq_len` tokens; `packed` fills a row with several of one domain.

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
    """Return at most `per_source` examples of each domain of `split`, each a row, in ascending order of length.

    They are chosen at random once and for all: no other setting changes the choice.
    """
    shuffled = np.asarray(_shuffled(examples))
    candidates = shuffled[np.isin(shuffled, _fitting(examples, split=split, seq_len=seq_len))]
    picked = [candidates[examples.sources[candidates] == source][:per_source] for source in np.unique(examples.sources)]
    rows = np.concatenate(picked)
    return [[index] for index in rows[np.argsort(examples.lengths[rows], kind="stable")].tolist()]


class ExampleRows:
    """Rows, each of which is the indices of its examples, all of one domain; `collate` makes a batch of some.

    The length of a batch is rounded up to a multiple of `length_multiple`.
    """

    def __init__(self, examples: Examples, rows: Sequence[Sequence[int]], *, length_multiple: int) -> None:
        self.examples, self.rows, self._length_multiple = examples, rows, length_multiple

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.asarray([sum(self.examples.lengths[index] for index in row) for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sequence[int]:
        return self.rows[row]

    def collate(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return a batch: `input_ids`, `labels` (shifted), `position_ids` [B, T] and `source` [B], int64.

        T is the longest row's length, rounded up. No rows give a batch of one row without an example or a target, so
        that a rank that has nothing to train on in a step computes along with the others.
        """
        examples, rows = self.examples, rows or [()]
        longest = max(1, *(sum(int(examples.lengths[index]) for index in row) for row in rows))
        shape = (len(rows), -(-longest // self._length_multiple) * self._length_multiple)
        input_ids, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
        position_ids = np.empty(shape, dtype=np.int64)
        for number, row in enumerate(rows):
            start = 0
            position_ids[number] = np.arange(shape[1])
            for index in row:
                tokens, prompt_length = examples.example(index), examples.prompt_lengths[index]
                end = start + len(tokens) - 1
                input_ids[number, start:end] = tokens[:-1]
                labels[number, start + prompt_length - 1 : end] = tokens[prompt_length:]
                position_ids[number, start:] = np.arange(shape[1] - start)
                start = end
        source = np.asarray([examples.sources[row[0]] if row else 0 for row in rows])
        columns = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "source": source}
        return {name: torch.from_numpy(column) for name, column in columns.items()}


def short_prompts(examples: Examples, *, count: int, length: int) -> list[list[int]]:
    """Draw at most `count` whole prompts of at most `length` token ids; a warning says if there are fewer."""
    prompts = [examples.prompt(row) for row in _shuffled(examples) if examples.prompt_lengths[row] <= length]
    if not prompts:
        shortest = examples.prompt_lengths.min()
        raise DataError(f"no prompt of at most {length} tokens; the shortest has {shortest}: raise prompt_length")
    if len(prompts) < count:
        _log.warning("%d prompts asked for, %d have at most %d tokens", count, len(prompts), length)
    return prompts[:count]


def generation_examples(examples: Examples, *, count: int, domains: Sequence[str]) -> list[GenerationExample]:
    """Return at most `count` shuffled examples with their references, each grouped under its domain."""
    return [
        GenerationExample(examples.prompt(row), examples.references[row], domains[examples.sources[row]])
        for row in _shuffled(examples)[:count]
    ]


def _shuffled(examples: Examples) -> list[int]:
    """Return all examples in an order that no setting changes, so that results of runs can be compared."""
    order: list[int] = np.random.default_rng(0).permutation(len(examples.sources)).tolist()
    return order


def _fitting(examples: Examples, *, split: Split, seq_len: int) -> npt.NDArray[np.int64]:
    fits = examples.lengths <= seq_len
    if not fits.any():
        raise DataError(f"no {split} row has at most {seq_len} tokens; raise seq_len")
    if not fits.all():
        _log.warning("%d of %d %s rows skipped: longer than seq_len %d", (~fits).sum(), len(fits), split, seq_len)
    return np.flatnonzero(fits)
