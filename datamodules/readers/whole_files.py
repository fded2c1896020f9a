"""Kinds `files`, `stdlib_code` and `stdlib_text`: every file is read whole."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property
from itertools import islice

import numpy as np

from datamodules.readers.chunks import Groups
from datamodules.readers.docstrings import docstrings
from datamodules.readers.files import TOPICS, FileList
from datamodules.readers.fingerprint import fingerprint
from datamodules.readers.records import BadRecord, Record
from datamodules.readers.sources import Document, Source
from datamodules.readers.streams import READ_ERRORS, decode, open_bytes, size_change, why

_FILE_COST = 4096  # bytes that could be read in the time that opening a file takes
_MIN_DOCSTRING_CHARS = 80  # shorter ones are labels, not prose


class WholeFileReader:
    """Chunks are groups of files; see `datamodules.readers.records.Reader`."""

    def __init__(self, source: Source, files: FileList, *, min_chunks: int, seed: int) -> None:
        self._source, self._files = source, files
        self._groups = Groups(files.sizes + np.int64(_FILE_COST), min_chunks=min_chunks, seed=seed)
        self.num_chunks = self._groups.num_chunks

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the source; see `datamodules.readers.records.Reader`."""
        return fingerprint(self._source, self._files.digest_parts(), self.num_chunks, self._groups.order)

    def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
        """The records of `chunk` from index `start` on."""
        files = self._groups.units(chunk)
        if self._source.kind == "stdlib_text":  # some files give several
            return islice((record for file in files for record in self._prose(file)), start, None)
        return (self._whole(file) for file in files[start:])

    def _whole(self, file: int) -> Record:
        name, path, limit = self._files.name(file), self._files.path(file), self._source.max_bytes
        try:
            with open_bytes(path) as stream:
                raw = stream.read(limit + 1)
            changed = size_change(path, int(self._files.sizes[file]))
        except READ_ERRORS as error:
            return BadRecord(name, why(error))
        if changed:
            return BadRecord(name, changed)
        if len(raw) > limit:
            return BadRecord(name, f"longer than {self._source.max_document_megabytes:g} megabytes")
        text, problem = decode(raw)
        return BadRecord(name, problem) if problem else Document(name, text, origin=text)

    def _prose(self, file: int) -> Iterator[Record]:
        module = self._whole(file)
        if isinstance(module, BadRecord):
            yield module
            return
        try:
            yield from _topics(module) if module.name == TOPICS else _docstrings(module)
        except (SyntaxError, ValueError) as error:
            yield BadRecord(module.name, f"not Python: {error}")


def _topics(module: Document) -> Iterator[Document]:
    """The documentation topics, each a document."""
    (table,) = (node.value for node in ast.parse(module.text).body if isinstance(node, ast.Assign))
    for topic, body in ast.literal_eval(table).items():
        yield Document(f"{module.name}:{topic}", body, origin=body)


def _docstrings(module: Document) -> Iterator[Document]:
    """All long docstrings of a module as one document."""
    if prose := docstrings(module.text, min_chars=_MIN_DOCSTRING_CHARS):
        # headed by the module's name, so that no two modules give the same document
        text = "\n\n".join([module.name.removesuffix(".py"), *prose]) + "\n"
        yield Document(module.name, text, origin=module.text)
