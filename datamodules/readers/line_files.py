"""Kinds `lines` and `jsonl`: a document a line, from files that are cut where no line is cut.

A line belongs to the chunk in which its first byte lies. Blank lines separate; they are no records. A file that is
compressed cannot be cut: it is read whole, or dealt out line by line where there are too few of them.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from datamodules.readers.chunks import ByteRanges, Groups, Piece, stride
from datamodules.readers.files import FileList
from datamodules.readers.fingerprint import fingerprint
from datamodules.readers.json_field import JsonField
from datamodules.readers.records import BadRecord, LostRecords, Record
from datamodules.readers.sources import Document, Source
from datamodules.readers.streams import READ_ERRORS, decode, is_compressed, open_bytes, size_change, why

_BLOCK_BYTES = 1 << 20
_COUNTED_BYTES = 1 << 26  # as far into a file as its lines are counted for a message
_BEGINNING_BYTES = 1024
_NO_END = 1 << 62
_ARRAY = "the file is a JSON array, not an object a line: jq -c '.[]' FILE > FILE.jsonl makes it one"


class LineReader:
    """Chunks are ranges of bytes, then compressed files; see `datamodules.readers.records.Reader`."""

    def __init__(self, source: Source, files: FileList, *, min_chunks: int, seed: int) -> None:
        self._text = JsonField(source.field).read if source.kind == "jsonl" else decode
        self._source, self._max_bytes = source, source.max_bytes
        compressed = np.array([is_compressed(files.name(file)) for file in range(len(files))])
        self._plain, self._compressed = files.take(np.flatnonzero(~compressed)), files.take(np.flatnonzero(compressed))
        self._ranges = ByteRanges(self._plain.sizes, min_chunks=min_chunks, seed=seed)
        self._groups = Groups(self._compressed.sizes, min_chunks=min_chunks, seed=seed)
        self._stride = stride(
            self._groups.num_chunks, min_chunks=min_chunks, source=source.name, unit="compressed file"
        )
        self.num_chunks = self._ranges.num_chunks + self._groups.num_chunks * self._stride

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the source; see `datamodules.readers.records.Reader`."""
        ranges, groups = self._ranges, self._groups
        layout = (ranges.num_chunks, ranges.order, groups.num_chunks, groups.order, self._stride)
        parts = chain(self._plain.digest_parts(), self._compressed.digest_parts())
        return fingerprint(self._source, parts, *layout)

    def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
        """The records of `chunk` from index `start` on."""
        group, first = divmod(chunk - self._ranges.num_chunks, self._stride)
        if group < 0:
            pieces = [_Piece(self._plain, piece) for piece in self._ranges.pieces(chunk)]
            lines = islice(self._lines(pieces), start, None)
        else:
            pieces = [_Piece(self._compressed, Piece(file, 0, _NO_END)) for file in self._groups.units(group)]
            lines = islice(self._lines(pieces), first + start * self._stride, None, self._stride)
        return map(self._record, lines)

    def _lines(self, pieces: list[_Piece]) -> Iterator[_Line]:
        return chain.from_iterable(piece.lines(self._max_bytes) for piece in pieces)

    def _record(self, line: _Line) -> Record:
        lost = isinstance(line.content, str)
        text, problem = ("", line.content) if isinstance(line.content, str) else self._text(line.content)
        if problem:
            if self._source.kind == "jsonl" and line.number > 0 and line.piece.is_array:
                problem = _ARRAY
            return (LostRecords if lost and line.number < 0 else BadRecord)(line.piece.place(line), problem)
        return Document(f"{line.piece.name}@{line.offset}", text, origin=text)


class _Line(NamedTuple):
    """One line, not decoded; a str says what is wrong.

    `number` is counted from 1 in its piece; 0: the whole piece is meant; -1: what could not be read of it.
    """

    piece: _Piece
    number: int
    offset: int
    content: bytes | str


class _Piece:
    """The lines that begin in a range of bytes of a file."""

    def __init__(self, files: FileList, piece: Piece) -> None:
        self.name, self._path = files.name(piece.file), files.path(piece.file)
        self._size, self._begin, self._end = int(files.sizes[piece.file]), piece.begin, piece.end

    def lines(self, max_bytes: int) -> Iterator[_Line]:
        """The lines without their ends; at most `max_bytes` of one are ever in memory."""
        problem, number = "", 0
        try:
            with open_bytes(self._path) as stream:
                yield from self._lines_of(stream, max_bytes)
            problem = size_change(self._path, self._size)
        except READ_ERRORS as error:
            problem, number = why(error), -1
        if problem:
            yield _Line(self, number, self._begin, problem)

    def _lines_of(self, stream: BinaryIO, max_bytes: int) -> Iterator[_Line]:
        offset = number = 0
        if self._begin:  # the line before may end here exactly: then its newline is all that is skipped
            stream.seek(self._begin - 1)
            offset = self._skip(stream, self._begin - 1)
        limit = max_bytes + len(codecs.BOM_UTF8) + len(b"\r\n")
        while offset < self._end and (raw := stream.readline(limit)):
            begin, number = offset, number + 1
            offset += len(raw)
            content = raw.removeprefix(codecs.BOM_UTF8) if begin == 0 else raw
            content = content.rstrip(b"\r\n")
            is_cut = len(raw) == limit and not raw.endswith(b"\n")
            if is_cut:
                offset = self._skip(stream, offset)
            if is_cut or len(content) > max_bytes:
                yield _Line(self, number, begin, f"longer than {max_bytes} bytes")
            elif content and not content.isspace():
                yield _Line(self, number, begin, content)

    def _skip(self, stream: BinaryIO, offset: int) -> int:
        """Where the next line begins, or somewhere behind the end."""
        while offset < self._end and (part := stream.readline(_BLOCK_BYTES)):
            offset += len(part)
            if part.endswith(b"\n"):
                break
        return offset

    def place(self, line: _Line) -> str:
        """Where a line is, for a message."""
        if line.number <= 0:
            return self.name
        if self._lines_before is None:
            return f"{self.name}:byte {line.offset}"
        return f"{self.name}:{self._lines_before + line.number}"

    @cached_property
    def is_array(self) -> bool:
        """Whether the file begins as a JSON array does; only asked for when a line is bad."""
        try:
            with open_bytes(self._path) as stream:
                return stream.read(_BEGINNING_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        except READ_ERRORS:  # which is reported in its own right
            return False

    @cached_property
    def _lines_before(self) -> int | None:
        """How many lines begin before this piece, or None: only asked for when a line is bad, and it takes a read."""
        if self._begin == 0:
            return 0
        if self._begin > _COUNTED_BYTES:
            return None
        try:
            return _count_newlines(self._path, self._begin - 1) + 1
        except OSError:  # the file went away, which is reported in its own right
            return None


def _count_newlines(path: Path, end: int) -> int:
    with path.open("rb") as file:
        return sum(file.read(min(_BLOCK_BYTES, end - at)).count(b"\n") for at in range(0, end, _BLOCK_BYTES))
