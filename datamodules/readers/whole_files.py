"""Kinds `files`, `stdlib_code` and `stdlib_text`: every file is read whole.

The docstrings of a module are found by scanning its text, which takes a tenth of the time of parsing it. That is tested
by tests/unit/datamodules/readers/test_docstrings.py.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import islice

import numpy as np

from datamodules.readers.chunks import Groups
from datamodules.readers.files import TOPICS, FileList
from datamodules.readers.records import (
    READ_ERRORS,
    BadRecord,
    Document,
    Record,
    decode,
    fingerprint,
    open_bytes,
    size_change,
    why_unreadable,
)
from datamodules.readers.sources import Source

_FILE_COST = 4096  # bytes that could be read in the time that opening a file takes
_MIN_DOCSTRING_CHARS = 80  # shorter ones are labels, not prose

_STRING = (
    r'(?:"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'
    r"|'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'(?:[^'\\\n]|\\.)*')"
)
_NO_CODE = rf"#[^\n]*|{_STRING}"  # matched as a whole, so that nothing in it is taken for code
_DEFINITION = re.compile(rf"^(?P<indent>[ \t]*)(?:async[ \t]+)?(?:def|class)[ \t]+\w|{_NO_CODE}", re.DOTALL | re.M)
_HEADER_PART = re.compile(rf"(?P<open>[(\[{{])|(?P<close>[)\]}}])|(?P<colon>:)|{_NO_CODE}", re.DOTALL)
_LITERAL = re.compile(
    r"(?:[ \t\f]*(?:#[^\n]*)?\r?\n)*[ \t\f]*"  # lines without code
    rf"(?P<literal>[rRuU]?{_STRING}(?:[ \t]*[rRuU]?{_STRING})*)"
    r"[ \t]*(?:[#;\r\n]|\Z)",  # else it is a part of a longer expression
    re.DOTALL,
)


class WholeFileReader:
    """A reader (`records.Reader`) whose chunks are groups of files."""

    def __init__(self, source: Source, files: FileList, *, min_chunks: int) -> None:
        self._source, self._files = source, files
        self._groups = Groups(files.sizes + np.int64(_FILE_COST), min_chunks=min_chunks)
        self.num_chunks = self._groups.num_chunks

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self._source, self._files.digest_parts(), self.num_chunks, self._groups.order)

    def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
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


def docstrings(code: str, *, min_chars: int) -> list[str]:
    """Find docstrings of a module, its classes and functions, as `inspect.cleandoc` leaves them; outer ones first.

    Those shorter than `min_chars` (1 or more) are left out. One in parentheses is not found, and some may be missing
    where `code` is not valid Python.
    """
    matches = [match for match in _DEFINITION.finditer(code) if match["indent"] is not None]
    bodies = sorted((len(match["indent"]), _body(code, match.end())) for match in matches)  # outer ones first
    found = (_docstring(code, begin, min_chars=min_chars) for begin in [0, *(begin for _, begin in bodies)])
    return [docstring for docstring in found if len(docstring) >= min_chars]


def _body(code: str, at: int) -> int:
    """Find the body of the definition with its header at `at`: it begins behind the first colon outside of brackets."""
    depth = 0
    for match in _HEADER_PART.finditer(code, at):
        depth += {"open": 1, "close": -1}.get(match.lastgroup or "", 0)
        if match.lastgroup == "colon" and depth == 0:
            return match.end()
    return len(code)


def _docstring(code: str, at: int, *, min_chars: int) -> str:
    """Return the docstring of the body that begins at `at`; "" if there is none of `min_chars` or more."""
    match = _LITERAL.match(code, at)
    if match is None or len(match["literal"]) < min_chars:
        return ""
    return inspect.cleandoc(ast.literal_eval(match["literal"]))
