"""TOPv2 examples as rows of a batch; labels are shifted here, once.

Shape legend: `B` rows, `T` tokens a row.

A row holds one example or, packed, several of one domain; position ids that restart keep them apart (see
`streaming.packing`). Rows are padded on the right. Under causal attention nothing before the padding sees it, so in a
batch of single examples the position ids simply go on: no mask is needed, and attention keeps its fast path.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from app.layerskip.early_exit_loss import IGNORE_INDEX
from datamodules.topv2_rows.store import Examples


class ExampleRows(Dataset[Sequence[int]]):
    """Rows, each of which is the indices of its examples, all of one domain; `collate` makes a batch of some.

    The length of a batch is rounded up to a multiple of `length_multiple`.
    """

    def __init__(self, examples: Examples, rows: Sequence[Sequence[int]], *, length_multiple: int) -> None:
        self.examples, self.rows, self._length_multiple = examples, rows, length_multiple

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, without padding."""
        return np.asarray([sum(self.examples.lengths[index] for index in row) for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sequence[int]:
        """Indices of the row's examples."""
        return self.rows[row]

    def collate(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """A batch: `input_ids`, `labels`, `position_ids` [B, T] and `source` [B], int64.

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
