"""Documents of one source, packed into rows of fixed length; labels are shifted here, once.

Shape legend: `N` rows, `S` tokens a row.

Every document is followed by the end-of-text token, and the stream is cut into rows: no token is dropped, and a
document may continue in the next row. Attention must not cross from one document into another. transformers
derives that mask from position ids that restart, if it is given no attention mask and no cache
(`attention_mask=None, use_cache=False`; with either, documents leak into one another silently).
The last row is filled up with end-of-text tokens that have no target and are each a document of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.layerskip.early_exit_loss import IGNORE_INDEX


@dataclass(frozen=True)
class PackedRows:
    """Packed documents of one source.

    Args:
        input_ids: [N, S] int32.
        labels: [N, S] int32; the token that follows in the same document, else `IGNORE_INDEX`. The last position
            of a row is labelled with the first token of the next row if the document goes on there.
        position_ids: [N, S] int32; restart at 0 with every document and with every row.
        offsets: [documents + 1] int64; where each document starts in the row-major stream, and where the last ends.
    """

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    position_ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.input_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents with their end-of-text tokens, without the padding."""
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        """Documents packed."""
        return len(self.offsets) - 1

    def document(self, index: int) -> npt.NDArray[np.int32]:
        """Token ids of one document, without the end-of-text token."""
        return self.input_ids.reshape(-1)[self.offsets[index] : self.offsets[index + 1] - 1]


def pack_documents(documents: Sequence[npt.NDArray[np.int32]], *, seq_len: int, eos_id: int) -> PackedRows:
    """Pack token documents into rows, in the order given.

    Args:
        documents: Token ids of each document, without an end-of-text token.
        seq_len: S, at least 2.
        eos_id: Id of the end-of-text token.
    """
    offsets = np.cumsum([0, *(len(document) + 1 for document in documents)], dtype=np.int64)
    num_tokens = int(offsets[-1])
    size = -(-num_tokens // seq_len) * seq_len
    stream = np.full(size + 1, eos_id, dtype=np.int32)
    for document, start in zip(documents, offsets, strict=False):  # offsets has one more: the end
        stream[start : start + len(document)] = document

    is_start = np.zeros(size + 1, dtype=bool)
    is_start[offsets] = True
    is_start[num_tokens:] = True
    labels = np.where(is_start[1:], np.int32(IGNORE_INDEX), stream[1:])

    index = np.arange(size, dtype=np.int32)
    restarts = is_start[:-1].copy()
    restarts[::seq_len] = True
    position_ids = index - np.maximum.accumulate(np.where(restarts, index, np.int32(0)))
    shape = (-1, seq_len)
    return PackedRows(stream[:-1].reshape(shape), labels.reshape(shape), position_ids.reshape(shape), offsets)
