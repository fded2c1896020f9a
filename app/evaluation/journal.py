"""Keeps what is found out about each example in a file as it comes, so that an evaluation that was killed goes on.

The first line has the settings, each further one an example. Tested by tests/unit/evaluation/test_journal.py.
"""

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

from app.errors import ConfigError, DataError, UserError, shortened
from app.evaluation.records import Decoded, Record, Score

_log = logging.getLogger(__name__)

_FIRST, _BEGINNING = b'{"settings": ', b'{"'  # of the first line, and of each
_SECONDS_TO_DISK = 1.0  # a killed process loses nothing, and a machine without power this much


class Journal:
    """The file of the examples that are done; use it in a `with` statement.

    Args:
        path: The file, which is begun if there is none.
        settings: All that the results depend on, as JSON.
        overwrite: Begin anew if the file is of other settings or damaged.

    Attributes:
        records: What is done, by task and row.

    Raises:
        ConfigError: The file is of other settings, or another process is writing it.
        DataError: A line before the last one is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self._path, self.records = path, dict[tuple[str, int], Record]()
        self._file = path.open("a+b")
        try:
            self._lock()
            told = json.loads(json.dumps(settings))
            try:
                self._read(told)
            except UserError:
                if not overwrite:
                    raise
                self._file.truncate(0)
                self.records.clear()
                self._read(told)
        except BaseException:
            self._file.close()
            raise
        self._synced = monotonic()

    def add(self, record: Record) -> None:
        """Write an example that is done."""
        self.records[record.task, record.row] = record
        line = record._asdict() | {"scores": [score._asdict() for score in record.scores]}
        self._write(line)
        if monotonic() - self._synced > _SECONDS_TO_DISK:
            os.fsync(self._file.fileno())
            self._synced = monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.fsync(self._file.fileno())
        if not self.records:  # an evaluation that was refused leaves nothing that refuses the next one
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            allowed = "a file that no other evaluation is writing"
            raise ConfigError("output", got=str(self._path), allowed=allowed) from error

    def _write(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def _read(self, settings: dict[str, Any]) -> None:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        half = lines.pop()  # a whole line ends in a line break
        begins = _BEGINNING if lines else _FIRST
        if not begins.startswith(half[: len(begins)]):
            raise self._damaged(len(lines) + 1, ValueError("it is not of an evaluation"))
        if lines:
            before = self._line(lines[0], 1).get("settings")
            if len(lines) == 1 and isinstance(before, dict):  # it was killed before an example was done
                lines = []
            else:
                self._check(before, settings)
        for number, line in enumerate(lines[1:], start=2):
            record = self._line(line, number)
            try:
                scores = tuple(map(_score, record.pop("scores")))
                self.records[record["task"], record["row"]] = Record(**record, scores=scores)
            except (LookupError, TypeError) as error:
                raise self._damaged(number, error) from error
        if half:
            self._file.truncate(sum(len(line) + 1 for line in lines))
            _log.warning("%s: its last line was half-written (%d bytes), and is dropped", self._path, len(half))
        if not lines:
            self._file.truncate(0)
            self._write({"settings": settings})
        if self.records:
            _log.info("%s: going on behind %d examples that are done", self._path, len(self.records))

    def _line(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise TypeError(f"got {type(content).__name__}, allowed an object")
        except (ValueError, TypeError, RecursionError) as error:
            raise self._damaged(number, error) from error
        return content

    def _damaged(self, number: int, error: Exception) -> DataError:
        return DataError(
            f"{self._path}, line {number}: no record of an evaluation ({shortened(error)}); remove the file"
        )

    def _check(self, before: object, settings: dict[str, Any]) -> None:
        if not isinstance(before, dict):
            raise self._damaged(1, TypeError("no settings"))
        for name in {**before, **settings}:
            if before.get(name) != settings.get(name):
                there = (
                    f"{name} is {shortened(repr(before.get(name)))} there and {shortened(repr(settings.get(name)))} now"
                )
                allowed = f"results of the same settings ({there})"
                fix = "name another output; --overwrite true replaces what is there"
                raise ConfigError("output", got=str(self._path), allowed=allowed, fix=fix)


def _score(stored: dict[str, Any]) -> Score:
    decoded = stored.pop("decoded")
    return Score(**stored, decoded=None if decoded is None else Decoded(*decoded))
