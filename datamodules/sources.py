"""Where documents come from: the sources a config lists, and what is read from each.

Reading has two steps, so that the cache can be checked without the second: the raw files of a source
(quick; their bytes are the corpus fingerprint), then the documents inside them.
"""

from __future__ import annotations

import ast
import logging
import math
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

from app.errors import ConfigError, DataError, check_choice

log = logging.getLogger(__name__)

SourceKind = Literal["stdlib_code", "stdlib_text", "files"]

_TOPICS = "pydoc_data/topics.py"
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "pydoc_data", "test", "tests", "idle_test", "__pycache__"}
_MIN_DOCSTRING_CHARS = 80  # shorter ones are labels, not prose


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of documents.

    Args:
        kind: `stdlib_code`: the running interpreter's standard library; `stdlib_text`: its documentation
            topics and docstrings; `files`: the files of a local folder.
        weight: Share of training rows, relative to the other sources; in (0, inf).
        path: The folder; for kind `files` only.
        glob: Which files in the folder; for kind `files` only.
        name: What logs and metrics call it; the datamodule takes it from the source's key.
    """

    kind: SourceKind
    weight: float = 1.0
    path: str | None = None
    glob: str = "**/*"
    name: str = ""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, _KINDS)
        if not 0 < self.weight < math.inf:
            raise ConfigError("weight", got=self.weight, allowed="(0, inf)", fix="remove unused sources")
        if self.kind == "files" and self.path is None:
            raise ConfigError("path", got=None, allowed="a folder, for a source of kind files")
        if self.kind != "files" and (self.path is not None or self.glob != "**/*"):
            log.warning("path and glob have no effect on a source of kind %s", self.kind)

    @property
    def root(self) -> Path:
        """The folder that file names are relative to."""
        return Path(sysconfig.get_path("stdlib") if self.path is None or self.kind != "files" else self.path)


class RawFile(NamedTuple):
    """A file as it lies on disk; `name` is relative to the source's root."""

    name: str
    raw: bytes


class Document(NamedTuple):
    """One text of a source.

    `origin` is the text whose hash decides on which side of the split it falls. It is `text` itself, but for
    docstrings: they follow the module they were taken from, or held-out prose would be trained on as code.
    """

    name: str
    text: str
    origin: str

    def is_held_out(self, *, share: float) -> bool:
        """Whether it belongs to validation: a pure function of the content, so other files cannot move it."""
        digest = sha256(self.origin.encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64


def read_files(source: Source) -> list[RawFile]:
    """The raw files of `source`, sorted by name.

    Raises:
        DataError: The folder is missing or no file in it matches.
    """
    root = source.root
    if not root.is_dir():
        raise DataError(f"source {source.name!r}: no folder {str(root)!r}; correct its path or create the folder")
    files = sorted(_KINDS[source.kind].list_files(source))
    if not files:
        raise DataError(f"source {source.name!r}: no file in {str(root)!r} matches {source.glob!r}; correct its glob")
    return [RawFile(file.relative_to(root).as_posix(), file.read_bytes()) for file in files]


def fingerprint(files: Sequence[RawFile]) -> str:
    """A hash of the names and contents of `files`."""
    total = sha256()
    for file in files:
        total.update(f"{file.name}\0{len(file.raw)}\0".encode() + sha256(file.raw).digest())
    return total.hexdigest()


def read_documents(source: Source, files: Sequence[RawFile], *, max_bad_share: float) -> list[Document]:
    """The documents in `files`; empty files and files that are not UTF-8 are skipped and logged.

    Raises:
        DataError: Nothing is left, or more than `max_bad_share` of the files had to be skipped.
    """
    documents: list[Document] = []
    bad: list[str] = []
    for file in files:
        try:
            text = file.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            bad.append(f"{file.name}: not UTF-8 at byte {error.start}")
            continue
        if text.strip():
            documents.extend(_KINDS[source.kind].documents(file.name, text))
        else:
            bad.append(f"{file.name}: empty")
    for reason in bad:
        log.info("source %r: skipped %s", source.name, reason)
    where = f"source {source.name!r} ({source.root})"
    report = f"{len(bad)} of {len(files)} files skipped" + "".join(f"\n  {reason}" for reason in bad[:20])
    if not documents:
        raise DataError(f"{where}: no document left; give it text files in UTF-8; {report}")
    if len(bad) > max_bad_share * len(files):
        raise DataError(f"{where}: more than max_bad_share {max_bad_share} is bad; mend or exclude; {report}")
    if bad:
        log.warning("%s: %d of %d files skipped", where, len(bad), len(files))
    return documents


def _list_stdlib(source: Source) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(source.root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


def _list_stdlib_text(source: Source) -> Iterator[Path]:
    yield from _list_stdlib(source)
    yield source.root / _TOPICS


def _list_folder(source: Source) -> Iterator[Path]:
    return (file for file in source.root.glob(source.glob) if file.is_file())


def _whole_file(name: str, text: str) -> Iterator[Document]:
    yield Document(name, text, origin=text)


def _prose(name: str, text: str) -> Iterator[Document]:
    """The documentation topics, each a document; or all long docstrings of a module as one document."""
    tree = ast.parse(text)
    if name == _TOPICS:
        table = next(node.value for node in tree.body if isinstance(node, ast.Assign))
        for topic, body in ast.literal_eval(table).items():
            yield Document(f"{name}:{topic}", body, origin=body)
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    prose = [docstring for docstring in found if len(docstring) >= _MIN_DOCSTRING_CHARS]
    if prose:  # headed by the module's name, so that no two modules give the same document
        yield Document(name, "\n\n".join([name.removesuffix(".py"), *prose]) + "\n", origin=text)


class _Kind(NamedTuple):
    list_files: Callable[[Source], Iterator[Path]]
    documents: Callable[[str, str], Iterator[Document]]


_KINDS: dict[SourceKind, _Kind] = {
    "stdlib_code": _Kind(_list_stdlib, _whole_file),
    "stdlib_text": _Kind(_list_stdlib_text, _prose),
    "files": _Kind(_list_folder, _whole_file),
}
