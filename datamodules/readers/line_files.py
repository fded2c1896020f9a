"""Kinds `lines` and `jsonl`: each line is a document, and files are cut only between lines.

A line belongs to the chunk in which its first byte lies. Blank lines separate; they are no records. A compressed file
cannot be cut: it is read whole, or dealt out line by line where there are too few of them.
"""

import codecs
from collections.abc import Iterator
from functools import cached_property
from itertools import chain, islice
from typing import BinaryIO, NamedTuple

import numpy as np

from datamodules.readers.chunks import ByteRange, ByteRanges, Groups, stride
from datamodules.readers.files import FileList
from datamodules.readers.records import (
    READ_ERRORS,
    BadRecord,
    Document,
    JsonField,
    LostRecords,
    Record,
    decode,
    fingerprint,
    is_compressed,
    open_bytes,
    size_change,
    why_unreadable,
)
from datamodules.readers.sources import Source

_BLOCK_BYTES = 1 << 20
_COUNTED_BYTES = 1 << 26  # lines of a file are counted up to here, for a message
_BEGINNING_BYTES = 1024
_NO_END = 1 << 62
_IS_ARRAY = "the file is a JSON array, not an object a line: jq -c '.[]' FILE > FILE.jsonl makes it one"


class LineReader:
    """A reader (`records.Reader`) whose first chunks are ranges of bytes, and whose last ones are compressed files."""

    def __init__(self, source: Source, files: FileList, *, min_chunks: int) -> None:
        self._text = JsonField(source.field).read if source.kind == "jsonl" else decode
        self._source = source
        compressed = np.array([is_compressed(files.name(file)) for file in range(len(files))])
        self._plain, self._compressed = files.take(np.flatnonzero(~compressed)), files.take(np.flatnonzero(compressed))
        self._ranges = ByteRanges(self._plain.sizes, min_chunks=min_chunks)
        self._groups = Groups(self._compressed.sizes, min_chunks=min_chunks)
        self._stride = stride(
            self._groups.num_chunks, min_chunks=min_chunks, source=source.name, unit="compressed file"
        )
        self.num_chunks = self._ranges.num_chunks + self._groups.num_chunks * self._stride

    @cached_property
    def fingerprint(self) -> str:
        ranges, groups = self._ranges, self._groups
        layout = (ranges.num_chunks, ranges.order, groups.num_chunks, groups.order, self._stride)
        parts = chain(self._plain.digest_parts(), self._compressed.digest_parts())
        return fingerprint(self._source, parts, *layout)

    def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
        group, first = divmod(chunk - self._ranges.num_chunks, self._stride)
        if group < 0:
            ranges = [_LineRange(self._plain, part) for part in self._ranges.ranges(chunk)]
            first, step = start, 1
        else:
            files = self._groups.units(group)
            ranges = [_LineRange(self._compressed, ByteRange(file, 0, _NO_END)) for file in files]
            first, step = first + start * self._stride, self._stride
        lines = chain.from_iterable(part.lines(self._source.max_bytes) for part in ranges)
        return map(self._record, islice(lines, first, None, step))

    def _record(self, line: "_Line | BadRecord") -> Record:
        if isinstance(line, BadRecord):
            return line
        text, problem = ("", line.content) if isinstance(line.content, str) else self._text(line.content)
        if not problem:
            return Document(f"{line.part.name}@{line.offset}", text, origin=text)
        if self._source.kind == "jsonl" and line.part.is_array:
            problem = _IS_ARRAY
        return BadRecord(line.part.location(line), problem)


class _Line(NamedTuple):
    """One line, not decoded; `number` counts from 1 in `part`, and a `content` that is a str says what is wrong."""

    part: "_LineRange"
    number: int
    offset: int
    content: bytes | str


class _LineRange:
    """The lines that begin in a range of bytes of a file."""

    def __init__(self, files: FileList, part: ByteRange) -> None:
        self.name, self._path = files.name(part.file), files.path(part.file)
        self._size, self._begin, self._end = int(files.sizes[part.file]), part.begin, part.end

    def lines(self, max_bytes: int) -> Iterator[_Line | BadRecord]:
        """Yield the lines without their ends; at most `max_bytes` of a line are ever in memory."""
        try:
            with open_bytes(self._path) as stream:
                yield from self._lines_of(stream, max_bytes)
            if change := size_change(self._path, self._size):
                yield BadRecord(self.name, change)
        except READ_ERRORS as error:
            yield LostRecords(self.name, why_unreadable(error))

    def _lines_of(self, stream: BinaryIO, max_bytes: int) -> Iterator[_Line]:
        offset = number = 0
        if self._begin:  # if the line before ends just here, its newline is all that is skipped
            stream.seek(self._begin - 1)
            offset = self._skip_line(stream, self._begin - 1)
        limit = max_bytes + len(codecs.BOM_UTF8) + len(b"\r\n")
        while offset < self._end and (raw := stream.readline(limit)):
            begin, number = offset, number + 1
            offset += len(raw)
            content = raw.removeprefix(codecs.BOM_UTF8) if begin == 0 else raw
            content = content.rstrip(b"\r\n")
            is_cut = len(raw) == limit and not raw.endswith(b"\n")
            if is_cut:
                offset = self._skip_line(stream, offset)
            if is_cut or len(content) > max_bytes:
                yield _Line(self, number, begin, f"longer than {max_bytes} bytes")
            elif content and not content.isspace():
                yield _Line(self, number, begin, content)

    def _skip_line(self, stream: BinaryIO, offset: int) -> int:
        """Return where the next line begins, or somewhere behind the end of the range."""
        while offset < self._end and (part := stream.readline(_BLOCK_BYTES)):
            offset += len(part)
            if part.endswith(b"\n"):
                break
        return offset

    def location(self, line: _Line) -> str:
        if self._lines_before is None:
            return f"{self.name}:byte {line.offset}"
        return f"{self.name}:{self._lines_before + line.number}"

    @cached_property
    def is_array(self) -> bool:
        """Whether the file begins as a JSON array does; asked for only when a line is bad."""
        try:
            with open_bytes(self._path) as stream:
                return stream.read(_BEGINNING_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        except READ_ERRORS:  # the failure is reported where the lines are read
            return False

    @cached_property
    def _lines_before(self) -> int | None:
        """Number of lines that begin before this range, or None where counting them would read too much."""
        if self._begin == 0:
            return 0
        if self._begin > _COUNTED_BYTES:
            return None
        end = self._begin - 1
        try:
            with self._path.open("rb") as file:
                blocks = (file.read(min(_BLOCK_BYTES, end - begin)) for begin in range(0, end, _BLOCK_BYTES))
                return 1 + sum(block.count(b"\n") for block in blocks)
        except OSError:  # the file is gone, which is reported where the lines are read
            return None
