"""Compares entries of a checkpoint with what they must be. Tested by tests/integration/test_edited_checkpoints.py."""

import math
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from app.checkpoints.integrity import is_finite
from app.errors import CheckpointError
from app.words import dtype_name


class SavedEntry:
    """An entry of a checkpoint: its value, and the keys that lead to it.

    Each check raises CheckpointError naming the entry, what it is and what is allowed, and else returns the value or
    the entries below.
    """

    def __init__(self, value: Any, *keys: object, path: str | Path | None = None) -> None:
        self.value, self.keys, self._path = value, keys, path

    def __getitem__(self, key: Any) -> "SavedEntry":
        """Return the entry below this one; its value is MISSING where there is none."""
        is_there = isinstance(self.value, Mapping) and key in self.value
        if isinstance(self.value, list | tuple):
            is_there = isinstance(key, int) and key < len(self.value)
        return SavedEntry(self.value[key] if is_there else MISSING, *self.keys, key, path=self._path)

    def holding(self, value: object) -> "SavedEntry":
        return SavedEntry(value, *self.keys, path=self._path)

    def refuse(self, allowed: str) -> NoReturn:
        found = f"damaged or foreign, {'.'.join(map(str, self.keys))}: got {shown(self.value)}, allowed {allowed}"
        raise CheckpointError.unusable(self._path or "to load", found)

    def number(self, *, low: float = -math.inf, high: float = math.inf) -> float:
        """Return the value, which must be a finite number from `low` to `high`."""
        got = self.value
        if isinstance(got, bool) or not isinstance(got, int | float) or not low <= got <= high or math.isinf(got):
            self.refuse(f"a number in [{low}, {high}]")
        return got

    def count(self, *, low: int = 0, high: float = math.inf) -> int:
        """Return the value, which must be a whole number from `low` to `high`."""
        got = self.value
        if isinstance(got, bool) or not isinstance(got, int) or not low <= got <= high:
            self.refuse(f"a whole number in [{low}, {high}]" if low < high else f"{low}")
        return got

    def finite(self) -> Tensor:
        """Return the value, which must be a tensor without NaN and infinity, or one without memory."""
        if not is_finite(self.value):
            self.holding("NaN or infinity").refuse("finite numbers")
        return self.value  # type: ignore[no-any-return]

    def mapping(self, keys: Collection[object] | None = None) -> dict[Any, "SavedEntry"]:
        """Return the entries of a dict, which must have exactly these keys if some are given."""
        if not isinstance(self.value, Mapping):
            self.refuse("a dict")
        for key in keys or ():
            if key not in self.value:
                self[key].refuse("an entry")
        for key in self.value:
            if keys is not None and key not in keys:
                self[key].refuse("no such entry")
        return {key: self[key] for key in self.value}

    def sequence(self, *, length: int | None = None) -> list["SavedEntry"]:
        """Return the entries of a list or tuple, which must have this length if one is given."""
        if not isinstance(self.value, list | tuple) or length not in (None, len(self.value)):
            self.refuse("a list" if length is None else f"a list of {length}")
        return [self[index] for index in range(len(self.value))]

    def alike(self, like: object) -> None:
        """Require the types, keys, lengths, shapes and dtypes of `like`; a switch may be true, false or None."""
        got = self.value
        match like:
            case Tensor():
                if not isinstance(got, Tensor) or (got.shape, got.dtype) != (like.shape, like.dtype):
                    self.refuse(shown(like))
            case dict():
                for key, entry in self.mapping(like).items():
                    entry.alike(like[key])
            case list() | tuple():
                for entry, value in zip(self.sequence(length=len(like)), like, strict=True):
                    entry.alike(value)
            case None | bool():
                if got is not None and not isinstance(got, bool):
                    self.refuse("true, false or null")
            case int():
                self.count()
            case float():
                self.number()
            case _:
                if type(got) is not type(like):
                    self.refuse(f"a value of type {type(like).__name__}")


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()  # what was got where an entry is missing


def shown(value: object) -> str:
    """Show a value in few words for a message; a tensor as its dtype and shape."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    return textwrap.shorten(repr(value), 80, placeholder=" ...")
