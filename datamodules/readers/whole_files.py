"""Kinds `files`, `stdlib_code` and `stdlib_text`: every file is read whole."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property
from itertools import islice

import numpy as np

from datamodules.readers.chunks import Groups
from datamodules.readers.contents import READ_ERRORS, decode, open_bytes, size_change, why_unreadable
from datamodules.readers.docstrings import docstrings
from datamodules.readers.files import TOPICS, FileList
from datamodules.readers.records import BadRecord, Document, Record, fingerprint
from datamodules.readers.sources import Source

_FILE_COST = 4096  # bytes that could be read in the time that opening a file takes
_MIN_DOCSTRING_CHARS = 80  # shorter ones are labels, not prose


class WholeFileReader:
    """A reader (`records.Reader`) whose chunks are groups of files."""

    def __init__(self, source: Source, files: FileList, *, min_chunks: int, seed: int) -> None:
        self._source, self._files = source, files
        self._groups = Groups(files.sizes + np.int64(_FILE_COST), min_chunks=min_chunks, seed=seed)
        self.num_chunks = self._groups.num_chunks

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the files and the layout of chunks."""
        return fingerprint(self._source, self._files.digest_parts(), self.num_chunks, self._groups.order)

    def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
        """Yield the records of `chunk` from index `start` on."""
        files = self._groups.units(chunk)
        if self._source.kind == "stdlib_text":  # some files give several records
            return islice((record for file in files for record in self._prose(file)), start, None)
        return (self._whole(file) for file in files[start:])

    def _whole(self, file: int) -> Record:
        name, path, limit = self._files.name(file), self._files.path(file), self._source.max_bytes
        try:
            with open_bytes(path) as stream:
                raw = stream.read(limit + 1)
            problem = size_change(path, int(self._files.sizes[file]))
        except READ_ERRORS as error:
            return BadRecord(name, why_unreadable(error))
        if not problem and len(raw) > limit:
            problem = f"longer than {self._source.max_document_megabytes:g} megabytes"
        text, problem = ("", problem) if problem else decode(raw)
        return BadRecord(name, problem) if problem else Document(name, text, origin=text)

    def _prose(self, file: int) -> Iterator[Record]:
        """Yield the long docstrings of a module as one document, or each of Python's documentation topics as one."""
        module = self._whole(file)
        if isinstance(module, BadRecord):
            yield module
            return
        try:
            if module.name == TOPICS:
                (table,) = (node.value for node in ast.parse(module.text).body if isinstance(node, ast.Assign))
                for topic, body in ast.literal_eval(table).items():
                    yield Document(f"{TOPICS}:{topic}", body, origin=body)
            elif prose := docstrings(module.text, min_chars=_MIN_DOCSTRING_CHARS):
                # The module's name comes first, so that no two modules give the same document.
                text = "\n\n".join([module.name.removesuffix(".py"), *prose]) + "\n"
                yield Document(module.name, text, origin=module.text)
        except (SyntaxError, ValueError) as error:
            yield BadRecord(module.name, f"not Python: {error}")
