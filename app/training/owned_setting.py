"""A setting of the module that callbacks write: at most one of them in a step, so that nobody's is passed over."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import FrameType
from typing import Generic, NamedTuple, TypeVar

from lightning.pytorch import Callback

from app.errors import ConfigError

Value = TypeVar("Value")


class _Writer(NamedTuple):
    """Who wrote.

    Attributes:
        name: For people: a callback's class, or a function and where it stands.
        callback_id: Identity of the callback; None for other code.
    """

    name: str
    callback_id: int | None

    def is_among(self, callbacks: Iterable[Callback]) -> bool:
        """Whether it can write in a fit with these callbacks; code outside of callbacks always can."""
        return self.callback_id is None or self.callback_id in map(id, callbacks)


class OwnedSetting(Generic[Value]):
    """A value and who wrote it; the writer is found on the call stack, so that writing takes no extra argument.

    Args:
        name: What is set, in the plural, for messages.
        default: The value of a fit in which nobody writes.
        fix: What to do about two writers.
    """

    def __init__(self, name: str, default: Value, *, fix: str) -> None:
        self.name, self.default, self.fix = name, default, fix
        self.value = default
        self._writers: list[_Writer] = []  # since the latest training micro-batch, in order
        self._latest: _Writer | None = None

    def write(self, value: Value) -> None:
        """Use `value` from the next micro-batch on."""
        self.value, self._latest = value, _writer(inspect.currentframe())
        if self._latest not in self._writers:
            self._writers.append(self._latest)

    def start_fit(self, callbacks: Iterable[Callback]) -> None:
        """Back to the default, where the value was left behind by a callback of an earlier fit."""
        if self._latest is not None and not self._latest.is_among(callbacks):
            self.value = self.default

    def start_micro_batch(self, callbacks: Iterable[Callback]) -> Value:
        """The value to use.

        Raises:
            ConfigError: Two wrote it since the last micro-batch; the message names them.
        """
        writers = [writer.name for writer in self._writers if writer.is_among(callbacks)]
        self._writers = []
        if len(writers) > 1:
            allowed = f"one that sets the {self.name}"
            raise ConfigError("trainer.callbacks", got=" and ".join(writers), allowed=allowed, fix=self.fix)
        return self.value


def _writer(write: FrameType | None) -> _Writer:
    """The innermost callback among the callers of the setter that called `write`, else the setter's caller."""
    setter = write and write.f_back
    caller = frame = setter and setter.f_back
    while frame is not None:
        if isinstance(own := frame.f_locals.get("self"), Callback):
            return _Writer(type(own).__name__, id(own))
        frame = frame.f_back
    assert caller is not None  # CPython has frames
    code = caller.f_code
    return _Writer(f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})", None)
