"""Texts out of raw bytes and JSON objects, or the reason why there is none.

Tested by tests/unit/datamodules/readers/test_line_files.py and test_hub.py.
"""

from __future__ import annotations

import json

from datamodules.readers.records import EMPTY


def decode(raw: bytes) -> tuple[str, str]:
    """The text, or "" and the reason why there is none."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 at byte {error.start}"
    return ("", EMPTY) if _is_blank(text) else (text, "")


class JsonField:
    """Reads one field of JSON objects; `a.b` also means `b` inside of `a`, if there is no field `a.b`."""

    def __init__(self, field: str) -> None:
        self._field, self._path = field, field.split(".")

    def read(self, raw: bytes) -> tuple[str, str]:
        """The text in a line, or "" and the reason why there is none."""
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
        """The text in an object, or "" and the reason why there is none."""
        if not isinstance(value, dict):
            return "", f"not a JSON object but {type(value).__name__}"
        found: object = value
        for key in [self._field] if self._field in value else self._path:
            if not isinstance(found, dict) or key not in found:
                return "", f"no field {self._field!r}; it has {', '.join(map(repr, list(value)[:20]))}"
            found = found[key]
        if not isinstance(found, str):
            return "", f"field {self._field!r} is {type(found).__name__}, not text"
        return ("", f"field {self._field!r} is empty") if _is_blank(found) else (found, "")


def _is_blank(text: str) -> bool:
    return not text or text.isspace()
