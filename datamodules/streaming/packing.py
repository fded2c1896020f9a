"""Documents packed into rows of a fixed length; labels are shifted here, once.

Shape legend: `S` tokens a row.

Every document is followed by the end-of-text token. Attention must not cross from one document into another:
transformers derives that mask from position ids that restart, if it is given no attention mask and no cache
(`attention_mask=None, use_cache=False`; with either, documents leak into one another silently).

Rows can be asked for from the middle: each comes with the place at which the next one begins, and the same documents
from that place on give the same rows again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from app.layerskip.early_exit_loss import IGNORE_INDEX

Tokens = npt.NDArray[np.int32]
Packing = Literal["split", "best_fit"]
LongDocuments = Literal["split", "truncate"]

_ROWS_A_GROUP = 32  # documents that best fit chooses from: tokens of so many rows


class Row(NamedTuple):
    """One packed row.

    Attributes:
        input_ids: [S]; padding is any token, each a document of its own without a target.
        labels: [S]; the token that follows in the same document, else `IGNORE_INDEX`. The last position is labelled
            with the first token of the next row if the document goes on there.
        position_ids: [S]; restart at 0 with every document and with every row.
        num_tokens: Of documents and their end-of-text tokens, 1..S; the others are padding.
    """

    input_ids: Tokens
    labels: Tokens
    position_ids: Tokens
    num_tokens: int


class PackedRow(NamedTuple):
    """A row, and where the next one begins: `within` the last document of `finished` + 1, in the packing's own unit."""

    row: Row
    finished: int
    within: int


class _Piece(NamedTuple):
    """Tokens start..stop-1 of a document."""

    document: Tokens
    start: int
    stop: int


def split_rows(documents: Iterator[Tokens | None], *, seq_len: int, within: int = 0) -> Iterator[PackedRow]:
    """Cut the stream of documents into rows: no token is dropped, a document may go on in the next row.

    Args:
        documents: Token ids of each, ending with the end-of-text token; the row they end in is padded. None is skipped.
        seq_len: S, at least 2.
        within: Tokens of the first document that earlier rows took.

    Yields:
        Rows; `finished` counts documents used up, `within` tokens taken of the one after.
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
    """Put whole documents into rows: of the rows begun, the fullest with room; a document longer than a row is cut.

    Documents are packed in groups of about 32 rows of tokens, the longest first (best fit decreasing, Ding et al. 2024,
    arXiv 2404.10830); rows are padded.

    Args:
        documents: Token ids of each, ending with the end-of-text token; None ends a group before it is full.
        seq_len: S, at least 2.
        within: Rows of the first group that were given out already.

    Yields:
        Rows; `finished` counts documents of complete groups, `within` rows taken of the group after.
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
    """Rows of pieces; in the order in which their first documents came, so that long ones are not all first."""
    pieces = [
        (index, _Piece(document, start, min(len(document), start + seq_len)))
        for index, document in enumerate(group)
        for start in range(0, len(document), seq_len)
    ]
    pieces.sort(key=lambda item: item[1].start - item[1].stop)  # stable
    rows: list[list[tuple[int, _Piece]]] = []
    by_room: list[tuple[int, int]] = []  # (room, row), ascending
    for index, piece in pieces:
        size = piece.stop - piece.start
        place = bisect_left(by_room, (size, 0))
        if place == len(by_room):
            rows.append([])
            room, row = seq_len, len(rows) - 1
        else:
            room, row = by_room.pop(place)
        rows[row].append((index, piece))
        insort(by_room, (room - size, row))
    rows.sort(key=lambda row: min(index for index, _ in row))
    return [[piece for _, piece in row] for row in rows]


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
