"""What a user can get wrong, said once and said well: field, got, allowed, fix."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Self


class UserError(Exception):
    """An error the user can mend; the command line prints it without a traceback and exits with status 2."""


class ConfigError(UserError, ValueError):
    """A setting that cannot be used.

    Args:
        field: Name of the setting, as the constructor spells it; the command line completes it to its full path.
        got: The offending value.
        allowed: What would have been accepted, in words or as an interval.
        fix: Optional advice on what to do.
    """

    def __init__(self, field: str, *, got: object, allowed: str, fix: str = "") -> None:
        self.field, self.got, self.allowed, self.fix = field, got, allowed, fix
        super().__init__(field, got, allowed, fix)

    def __str__(self) -> str:
        return self.message(self.field)

    def message(self, field: str) -> str:
        """The one-line message, with `field` written as given (for instance as a full path)."""
        advice = f"; {self.fix}" if self.fix else ""
        return f"{field}: got {self.got!r}, allowed {self.allowed}{advice}"


class DataError(UserError):
    """Data that is missing, empty or unreadable; the message names the source and the place in it."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written or used with this model; the message names file and reason."""

    @classmethod
    def unusable(cls, path: object, found: str, cause: BaseException | None = None) -> Self:
        """The error about a checkpoint in which `found` was found; of the cause, the message is shortened to a line."""
        reason = "" if cause is None else f" ({textwrap.shorten(str(cause), 300)})"
        return cls(f"checkpoint {path}: {found}{reason}; use an earlier one")


class DisagreementError(UserError):
    """Ranks were about to compute different things; the message names the first difference and what each rank had."""


class NotFiniteError(UserError):
    """A model computes something that is not finite where a token is to be chosen."""


class DivergenceError(UserError):
    """Training produced a loss or gradient that is not finite; the message names step and exit."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on; each once: one raised again may be its own cause."""
    seen = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def check_range(
    field: str,
    value: float,
    *,
    low: float | None = None,
    high: float | None = None,
    high_open: bool = False,
    fix: str = "",
) -> None:
    """Raise ConfigError unless `low <= value <= high` (`< high` when `high_open`); NaN never passes."""
    low_ok = low is None or value >= low
    high_ok = high is None or (value < high if high_open else value <= high)
    if low_ok and high_ok and value == value:  # the last one rejects NaN
        return
    left = "(-inf" if low is None else f"[{low}"
    right = "inf)" if high is None else f"{high}{')' if high_open else ']'}"
    raise ConfigError(field, got=value, allowed=f"{left}, {right}", fix=fix)


def check_choice(field: str, value: str, table: object) -> None:
    """Raise ConfigError unless `value` is a key of `table` (any container that lists the choices)."""
    choices = list(table)  # type: ignore[call-overload]
    if value not in choices:
        raise ConfigError(field, got=value, allowed=" | ".join(choices))


def require_total_steps(max_steps: int, *, field: str, got: str) -> int:
    """The length of the run in optimizer steps, or ConfigError: `field`'s value `got` cannot do without it."""
    if max_steps < 1:
        fix = "set trainer.max_steps"
        raise ConfigError(field, got=got, allowed="only in a run of known length (trainer.max_steps >= 1)", fix=fix)
    return max_steps
