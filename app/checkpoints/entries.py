"""Compares single entries of a checkpoint with what they must be, and refuses by name those that do not fit.

Tested by tests/integration/test_edited_checkpoints.py.
"""

import math
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from app.checkpoints.integrity import is_finite
from app.errors import CheckpointError

Entry = tuple[object, ...]  # the keys that lead to an entry


class SavedEntries:
    """Checks for the entries of one checkpoint.

    Each method raises CheckpointError naming the entry, what it is and what is allowed, and else returns the entry.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = path or "to load"

    def refuse(self, entry: Entry, got: object, allowed: str) -> NoReturn:
        """Raise the CheckpointError."""
        name = ".".join(map(str, entry))
        raise CheckpointError.unusable(self._path, f"damaged or foreign, {name}: got {shown(got)}, allowed {allowed}")

    def number(self, entry: Entry, got: object, *, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number from `low` to `high`."""
        if isinstance(got, bool) or not isinstance(got, int | float) or not low <= got <= high or math.isinf(got):
            self.refuse(entry, got, f"a number in [{low}, {high}]")
        return got

    def count(self, entry: Entry, got: object, *, low: int = 0, high: float = math.inf) -> int:
        """A whole number from `low` to `high`."""
        if isinstance(got, bool) or not isinstance(got, int) or not low <= got <= high:
            self.refuse(entry, got, f"a whole number in [{low}, {high}]" if low < high else f"{low}")
        return got

    def finite(self, entry: Entry, got: Tensor) -> Tensor:
        """A tensor without NaN and infinity, or one without memory."""
        if not is_finite(got):
            self.refuse(entry, "NaN or infinity", "finite numbers")
        return got

    def keys(self, entry: Entry, got: object, allowed: Collection[object]) -> dict[Any, Any]:
        """A dict with exactly these keys."""
        entries = self.any_keys(entry, got)
        for key in allowed:
            if key not in entries:
                self.refuse((*entry, key), MISSING, "an entry")
        for key in entries:
            if key not in allowed:
                self.refuse((*entry, key), entries[key], "no such entry")
        return entries

    def any_keys(self, entry: Entry, got: object) -> dict[Any, Any]:
        """A dict."""
        if not isinstance(got, dict):
            self.refuse(entry, got, "a dict")
        return got

    def sequence(self, entry: Entry, got: object, *, length: int | None = None) -> list[Any] | tuple[Any, ...]:
        """A list or tuple, of this length if one is given."""
        if not isinstance(got, list | tuple) or length not in (None, len(got)):
            self.refuse(entry, got, "a list" if length is None else f"a list of {length}")
        return got

    def alike(self, entry: Entry, got: object, like: object) -> None:
        """A value with the types, keys, lengths, shapes and dtypes of `like`; a switch may be true, false or None."""
        match like:
            case Tensor():
                if not isinstance(got, Tensor) or (got.shape, got.dtype) != (like.shape, like.dtype):
                    self.refuse(entry, got, shown(like))
            case dict():
                saved = self.keys(entry, got, like)
                for key, value in like.items():
                    self.alike((*entry, key), saved[key], value)
            case list() | tuple():
                for index, value in enumerate(self.sequence(entry, got, length=len(like))):
                    self.alike((*entry, index), value, like[index])
            case None | bool():
                if got is not None and not isinstance(got, bool):
                    self.refuse(entry, got, "true, false or null")
            case int():
                self.count(entry, got)
            case float():
                self.number(entry, got)
            case _:
                if type(got) is not type(like):
                    self.refuse(entry, got, f"a value of type {type(like).__name__}")


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()  # what was got where an entry is missing


def shown(value: object) -> str:
    """A value in few words for a message; a tensor as its dtype and shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return textwrap.shorten(repr(value), 80, placeholder=" ...")
