"""Errors that a user can mend, in one form: field, got, allowed, fix. Tested by tests/contract/test_command_line.py."""

import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self


class UserError(Exception):
    """An error that the user can mend; the command line prints it without a traceback and exits with status 2."""


class ConfigError(UserError, ValueError):
    """A setting that cannot be used.

    Args:
        field: Name of the setting, as the constructor spells it; the command line completes it to its full path.
        got: The offending value.
        allowed: What would be accepted, in words or as an interval.
        fix: Advice on what to do, or nothing.
    """

    def __init__(self, field: str, *, got: object, allowed: str, fix: str = "") -> None:
        self.field, self.got, self.allowed, self.fix = field, got, allowed, fix
        super().__init__(field, got, allowed, fix)

    def __str__(self) -> str:
        return self.message(self.field)

    def message(self, field: str) -> str:
        """The message in one line, with another name for the field, such as its full path."""
        advice = f"; {self.fix}" if self.fix else ""
        return f"{field}: got {self.got!r}, allowed {self.allowed}{advice}"


class DataError(UserError):
    """Data that is missing, empty or unreadable; the message names the source and the location in it."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written or used with this model; the message names file and reason."""

    @classmethod
    def unusable(cls, path: object, found: str, cause: BaseException | None = None) -> Self:
        """The error about checkpoint `path`, in which something was found; the cause is shortened to one line."""
        reason = "" if cause is None else f" ({shortened(cause)})"
        return cls(f"checkpoint {path}: {found}{reason}; use an earlier one")


class DisagreementError(UserError):
    """Ranks were about to compute different things; the message names the first difference, and each rank's value."""


class NotFiniteError(UserError):
    """A model's logits are not finite where a token is to be chosen from them."""


class DivergenceError(UserError):
    """A loss or gradient of training is not finite; the message names the step and the exit."""


def shortened(error: object) -> str:
    """An error's message in one line of at most 300 characters."""
    return textwrap.shorten(str(error), 300)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, the cause of that, and so on; each once, since an error may be its own cause."""
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
    if low_ok and high_ok and value == value:  # NaN is not equal to itself
        return
    left = "(-inf" if low is None else f"[{low}"
    right = "inf)" if high is None else f"{high}{')' if high_open else ']'}"
    raise ConfigError(field, got=value, allowed=f"{left}, {right}", fix=fix)


def check_exits(exit_layers: Sequence[int], *, num_layers: int) -> None:
    """Raise ConfigError unless there is some exit, and all are in 1..num_layers."""
    if not exit_layers or not all(1 <= exit_layer <= num_layers for exit_layer in exit_layers):
        allowed, fix = f"one or several of 1..{num_layers}", f"{num_layers} is the full model"
        raise ConfigError("exit_layers", got=[*exit_layers], allowed=allowed, fix=fix)


def check_early_exits(exit_layers: Sequence[int], *, num_layers: int, instead: str, field: str = "exit_layers") -> None:
    """Raise ConfigError unless all are in 1..num_layers - 1; `instead` says what a model of one block does without."""
    if all(1 <= exit_layer < num_layers for exit_layer in exit_layers):
        return
    allowed, fix = f"1..{num_layers - 1} for a {num_layers}-layer model", f"{num_layers} is the full model"
    if num_layers == 1:
        allowed, fix = "none in a model of one block", instead
    raise ConfigError(field, got=list(exit_layers), allowed=allowed, fix=fix)


def check_early_exit(field: str, exit_layer: int, *, num_layers: int) -> None:
    """Raise ConfigError unless `exit_layer` is in 1..num_layers - 1; a model of one block has none."""
    if num_layers == 1:
        raise ConfigError(field, got=exit_layer, allowed="none in a model of one block")
    check_range(field, exit_layer, low=1, high=num_layers - 1, fix="exits count blocks run")


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`, such as the keys of a table."""
    if value not in (names := [*choices]):
        raise ConfigError(field, got=value, allowed=" | ".join(names))


def check_output_file(path: str, *, suffix: str = "") -> Path:
    """The file that a verb is to write; ConfigError if it cannot be written, which is said before anything runs."""
    file = Path(path)
    fits = not suffix or file.suffix == suffix
    if not fits or file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        fix = "" if file.parent.exists() else f"make {file.parent}"
        kind = f"{suffix} file" if suffix else "file"
        allowed = f"a {kind} in a folder that exists and can be written to"
        raise ConfigError("output", got=path, allowed=allowed, fix=fix)
    return file


def check_new(output: str, files: Iterable[Path], *, field: str = "output") -> None:
    """Raise ConfigError if one of the files that a verb is to write is there, and is not empty, a pipe or a device."""
    if there := [file.name for file in files if file.is_file() and file.stat().st_size]:
        fix = f"--overwrite true replaces {', '.join(there)}"
        raise ConfigError(field, got=output, allowed="a new file", fix=fix)


def require_total_steps(max_steps: int, *, field: str, got: str) -> int:
    """The length of the run in optimizer steps, or ConfigError if it has none and value `got` of `field` needs one."""
    if max_steps < 1:
        fix = "set trainer.max_steps"
        raise ConfigError(field, got=got, allowed="only in a run of known length (trainer.max_steps >= 1)", fix=fix)
    return max_steps
