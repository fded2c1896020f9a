"""Documents packed into rows of a fixed length; labels are shifted here, once.

Shape legend: `S` tokens a row.

Every document is followed by the end-of-text token. Attention must not cross from one document into another.
transformers derives that mask from position ids that restart, provided it is given no attention mask and no cache
(`attention_mask=None, use_cache=False`); with either, documents see one another, and nothing tells of it.

Packing can begin in the middle: each row comes with the point at which the next one begins, and the same documents
give the same rows from there on.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from app.layerskip.early_exit_loss import IGNORE_INDEX
from datamodules.loading.best_fit import best_fit

Tokens = npt.NDArray[np.int32]
Packing = Literal["split", "best_fit"]
LongDocuments = Literal["split", "truncate"]

_ROWS_A_GROUP = 32  # best fit chooses from the documents of about so many rows


class Row(NamedTuple):
    """One packed row."""

    input_ids: Tokens  # [S]; padding is any token, each a document of its own without a target
    # [S]; the token that follows in the same document, else `IGNORE_INDEX`. The last position is labelled with the
    # first token of the next row if the document goes on there.
    labels: Tokens
    position_ids: Tokens  # [S]; restart at 0 with every document and with every row
    num_tokens: int  # of documents with their end-of-text tokens, 1 to S; the others are padding


class PackedRow(NamedTuple):
    """A row, and where the next one begins: behind `finished` documents, and `within` further units of the packing."""

    row: Row
    finished: int
    within: int


class _Piece(NamedTuple):
    """Tokens `start` to `stop` - 1 of a document."""

    document: Tokens
    start: int
    stop: int


def split_rows(documents: Iterator[Tokens | None], *, seq_len: int, within: int = 0) -> Iterator[PackedRow]:
    """Cut the stream of documents into rows: no token is dropped, and a document may go on in the next row.

    Documents are token ids that end with the end-of-text token; None is skipped. `within` counts tokens of a document
    that earlier rows took. The last row is padded.
    """
    pieces: list[_Piece] = []
    room, finished = seq_len, 0
    for document in documents:
        if document is None:
            continue
        while within < len(document):
            stop = min(len(document), within + room)
            pieces.append(_Piece(document, within, stop))
            room -= stop - within
            within = stop
            if room == 0:
                ended = within == len(document)
                yield PackedRow(_row(pieces, seq_len), finished + ended, 0 if ended else within)
                pieces, room = [], seq_len
        finished, within = finished + 1, 0
    if pieces:
        yield PackedRow(_row(pieces, seq_len), finished, 0)


def best_fit_rows(documents: Iterator[Tokens | None], *, seq_len: int, within: int = 0) -> Iterator[PackedRow]:
    """Put whole documents into rows by best fit; only a document longer than a row is cut, and rows are padded.

    Documents are packed in groups of about 32 rows of tokens (see `loading.best_fit`); None ends a group before it is
    full. `within` counts rows of a group that were given out already, and `finished` documents of complete groups.
    """
    finished = 0
    while group := _group(documents, at_least=_ROWS_A_GROUP * seq_len):
        rows = _best_fit(group, seq_len)
        for taken in range(within + 1, len(rows) + 1):
            row = _row(rows[taken - 1], seq_len)
            last = taken == len(rows)
            yield PackedRow(row, finished + len(group) * last, 0 if last else taken)
        finished, within = finished + len(group), 0


PACKINGS: dict[Packing, Callable[..., Iterator[PackedRow]]] = {"split": split_rows, "best_fit": best_fit_rows}


def _group(documents: Iterator[Tokens | None], *, at_least: int) -> list[Tokens]:
    group: list[Tokens] = []
    total = 0
    for document in documents:
        if document is not None:
            group.append(document)
            total += len(document)
        if group and (document is None or total >= at_least):
            break
    return group


def _best_fit(group: list[Tokens], seq_len: int) -> list[list[_Piece]]:
    """Return rows of pieces, in the order of their first documents, so that long documents do not all come first."""
    pieces = [
        _Piece(document, start, min(len(document), start + seq_len))
        for document in group
        for start in range(0, len(document), seq_len)
    ]
    rows = best_fit([piece.stop - piece.start for piece in pieces], capacity=seq_len)
    return [[pieces[index] for index in row] for row in sorted(rows, key=min)]


def _row(pieces: list[_Piece], seq_len: int) -> Row:
    num_tokens = sum(piece.stop - piece.start for piece in pieces)
    padding = seq_len - num_tokens
    filler = pieces[0].document[:1]
    none = np.array([IGNORE_INDEX], dtype=np.int32)
    labels = chain.from_iterable(
        (document[start + 1 : stop + 1], none[: stop == len(document)]) for document, start, stop in pieces
    )
    return Row(
        np.concatenate([*(document[start:stop] for document, start, stop in pieces), filler.repeat(padding)]),
        np.concatenate([*labels, none.repeat(padding)]),
        np.concatenate(
            [*(np.arange(stop - start, dtype=np.int32) for _, start, stop in pieces), np.zeros(padding, np.int32)]
        ),
        num_tokens,
    )
