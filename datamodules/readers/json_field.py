"""A text out of one JSON object."""

from __future__ import annotations

import json

import orjson

from datamodules.readers.streams import decode, is_blank


class JsonField:
    """Reads one field.

    Args:
        field: Its name; `a.b` also for `b` inside of `a`, if there is no field `a.b`.
    """

    def __init__(self, field: str) -> None:
        self._field, self._path = field, field.split(".")

    def read(self, raw: bytes) -> tuple[str, str]:
        """The text in a line, or nothing and the reason why there is none."""
        try:
            return self.pick(orjson.loads(raw))
        except orjson.JSONDecodeError:
            return self._read_mildly(raw)

    def _read_mildly(self, raw: bytes) -> tuple[str, str]:
        """Reads what Python writes and orjson refuses: NaN, halves of surrogate pairs. Says better what is wrong."""
        line, problem = decode(raw)
        if problem:
            return "", problem
        try:
            text, problem = self.pick(json.loads(line))
            text.encode()
        except UnicodeEncodeError as error:
            return "", f"field {self._field!r} has half a surrogate pair at character {error.start}"
        except (ValueError, RecursionError) as error:
            return "", f"malformed JSON: {error}"
        return text, problem

    def pick(self, value: object) -> tuple[str, str]:
        """The text in an object, or nothing and the reason why there is none."""
        if not isinstance(value, dict):
            return "", f"not a JSON object but {type(value).__name__}"
        found: object = value
        for key in [self._field] if self._field in value else self._path:
            if not isinstance(found, dict) or key not in found:
                return "", f"no field {self._field!r}; it has {', '.join(map(repr, list(value)[:20]))}"
            found = found[key]
        if not isinstance(found, str):
            return "", f"field {self._field!r} is {type(found).__name__}, not text"
        return ("", f"field {self._field!r} is empty") if is_blank(found) else (found, "")
