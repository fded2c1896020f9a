"""A source of documents: the settings of one entry of `data.sources`."""

import logging
import math
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

from pathspec import GitIgnoreSpec

from app.errors import ConfigError, check_choice

_log = logging.getLogger(__name__)

SourceKind = Literal["stdlib_code", "stdlib_text", "files", "lines", "jsonl", "parquet", "hub"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of documents. Local files may be compressed (.gz, .bz2, .zst).

    Args:
        kind: `stdlib_code`: the running interpreter's standard library; `stdlib_text`: its documentation topics and
            docstrings; `files`: each file a document; `lines`: each line that is not blank a document; `jsonl`: a
            field of each line's JSON object; `parquet`: a column; `hub`: a dataset of the Hugging Face hub, or a
            folder that `datasets` can read, streamed.
        weight: Share of training tokens, relative to the other sources; in (0, inf), 1.0 where it is not given.
        path: A folder or a file; for kind `hub` the dataset's id or folder.
        glob: Which files of the folder, `**` for any depth; by default all, or those named like the kind. Symbolic
            links are followed, but for those to a folder that they lie in.
        exclude: Files and folders to leave out, as lines of a .gitignore (which itself is not read); by default those
            of git and Python's caches.
        field: Name of the JSON field or column that holds the text; `a.b` for `b` inside of `a`.
        max_document_megabytes: Longer documents and lines are skipped and counted, in 10^6 bytes; in (0, 1000]. It
            also bounds the memory that reading takes.
        config_name: Which configuration (subset) of a hub dataset.
        split: Which split of a hub dataset.
        revision: Which commit, branch or tag of a hub dataset's repository; by default the newest commit. A resumed run
            must find the same commit.
        data_files: Which files of a hub dataset's repository, by name or glob.
        name: What logs and metrics call it; the datamodule takes it from the source's key.

    Raises:
        ConfigError: A field cannot be used.
    """

    kind: SourceKind
    weight: float | None = None
    path: str | None = None
    glob: str | None = None
    exclude: tuple[str, ...] = (".git/", "__pycache__/")
    field: str = "text"
    max_document_megabytes: float = 10.0
    config_name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        if not 0 < self.relative_weight < math.inf:
            raise ConfigError("weight", got=self.weight, allowed="(0, inf)", fix="remove unused sources")
        used = KINDS[self.kind].fields
        if "path" in used and not self.path:
            what = "a dataset id or folder" if self.kind == "hub" else "a folder or file"
            raise ConfigError("path", got=self.path, allowed=f"{what}, for a source of kind {self.kind}")
        if self.glob is not None and ("" in (parts := self.glob.split("/")) or ".." in parts):
            raise ConfigError("glob", got=self.glob, allowed="a pattern relative to path, such as **/*.py")
        try:
            GitIgnoreSpec.from_lines(self.exclude)
        except ValueError as error:
            raise ConfigError("exclude", got=self.exclude, allowed="lines of a .gitignore", fix=str(error)) from error
        if not self.field:
            raise ConfigError("field", got=self.field, allowed="the name of a field or column")
        if not 0 < self.max_document_megabytes <= 1000:
            raise ConfigError("max_document_megabytes", got=self.max_document_megabytes, allowed="(0, 1000]")
        if not self.split:
            raise ConfigError("split", got=self.split, allowed="the name of a split, such as train")
        set_ = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        if idle := sorted(set_ - used - {"kind", "weight", "name", "max_document_megabytes"}):
            verb = "has" if len(idle) == 1 else "have"
            _log.warning("%s %s no effect on a source of kind %s", " and ".join(idle), verb, self.kind)

    @property
    def relative_weight(self) -> float:
        return 1.0 if self.weight is None else self.weight

    @property
    def root(self) -> Path:
        """The folder or file that local names are relative to."""
        used = self.path if "path" in KINDS[self.kind].fields else None
        return Path(used or sysconfig.get_path("stdlib"))

    @property
    def pattern(self) -> str:
        return self.glob or KINDS[self.kind].glob

    @property
    def max_bytes(self) -> int:
        """Length of the longest document or line that is read, in bytes."""
        return int(self.max_document_megabytes * 1_000_000)


def token_shares(sources: Sequence[Source]) -> dict[str, float]:
    """Return the share of training tokens that each source is to give, by its name; they sum to 1."""
    total = sum(source.relative_weight for source in sources)
    return {source.name: source.relative_weight / total for source in sources}


def warn_of_mixed_weights(sources: Sequence[Source]) -> None:
    """Show the shares where only some sources have a weight: a user may take 0.7 for 70 %."""
    silent = [source.name for source in sources if source.weight is None]
    if 0 < len(silent) < len(sources):
        shares = ", ".join(f"{name} {share:.1%}" for name, share in token_shares(sources).items())
        verbs = "has no weight and counts" if len(silent) == 1 else "have no weight and count"
        _log.warning("sources: %s %s with 1.0, so that shares of tokens are: %s", " and ".join(silent), verbs, shares)


class _Kind(NamedTuple):
    """The fields with an effect on this kind but not on all, and the default glob."""

    fields: frozenset[str]
    glob: str = "**/*"


_FOLDER = frozenset({"path", "glob", "exclude"})

KINDS: dict[SourceKind, _Kind] = {
    "stdlib_code": _Kind(frozenset()),
    "stdlib_text": _Kind(frozenset()),
    "files": _Kind(_FOLDER),
    "lines": _Kind(_FOLDER),
    "jsonl": _Kind(_FOLDER | {"field"}, glob="**/*.jsonl*"),
    "parquet": _Kind(_FOLDER | {"field"}, glob="**/*.parquet"),
    "hub": _Kind(frozenset({"path", "field", "config_name", "split", "revision", "data_files"})),
}
