"""From an exception to the one message a user needs, with the full path of the field."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from traceback import walk_tb
from types import FrameType
from typing import Any

from app.cli.faults import fault_message
from app.errors import ConfigError, UserError, causes

_LIGHTNINGS = "MisconfigurationException"  # by name: verbs that decode do without loading Lightning

_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_DISKS = (*_FULL, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)  # with or without a file's name


# Base classes of Lightning's and torch's, by name, and the setting that chooses a class of theirs.
_CHOSEN_BY = {
    "Callback": "trainer.callbacks",
    "Logger": "trainer.logger",
    "Profiler": "trainer.profiler",
    "Optimizer": "model.optimizer",
    "LRScheduler": "model.lr_scheduler",
}


class LocatedError(UserError):
    """A ConfigError whose field is written as its path in the configuration."""


def user_message(error: BaseException) -> str | None:
    """The message for an error the user can mend, or None if it is a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if (message := _of_chosen_class(error)) or type(error).__name__ == _LIGHTNINGS:
        return message or str(error)
    if isinstance(error, OSError) and (error.errno in _OF_DISKS or error.filename is not None):
        named = isinstance(error.filename, str | bytes | os.PathLike)
        place = f": {os.fsdecode(error.filename)}" if named else ""
        mend = "make room" if error.errno in _FULL else "mend that"
        return (
            f"{error.strerror or error}{place}; files written before are whole: {mend} and repeat"
            " (fit resumes with --ckpt_path auto)"
        )
    return fault_message(error)


def locate(error: Exception, config: Any) -> LocatedError:
    """Complete the field to its path, found as the only place in `config` that holds the offending value.

    Args:
        error: Raised by a constructor, which knows its own argument's name but not where it was written;
            jsonargparse may have wrapped it.
        config: The parsed configuration as nested dicts and lists.
    """
    raised_from = list(causes(error))
    cause = next((each for each in raised_from if isinstance(each, ConfigError)), None)
    if cause is None:
        return LocatedError(next(filter(None, map(_of_chosen_class, raised_from)), str(raised_from[-1])))
    named = [(path, value) for path, value in walk(config) if path.rsplit(".", 1)[-1] == cause.field]
    paths = [path for path, value in named if value == cause.got] or [path for path, _ in named]
    return LocatedError(cause.message(paths[0] if len(paths) == 1 else cause.field))


def _of_chosen_class(error: BaseException) -> str | None:
    """What a class of Lightning's or torch's says of its settings or of the run, with the setting that chose it.

    None if code of anybody else was running: its error needs a traceback.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    text = re.sub(r"<[\w.]+?(\w+) object at \w+>", r"\1", " ".join(str(error).split()))
    for frame in frames:
        if frame.f_code.co_qualname == "Trainer.__init__":
            return _of_trainer(frame, text)
    for frame in reversed(frames):
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in ("lightning", "torch"):
            return None
        chosen = type(frame.f_locals.get("self"))
        for base in chosen.__mro__:
            if base.__name__ in _CHOSEN_BY and base.__module__.startswith(("lightning.", "torch.")):
                return f"{_CHOSEN_BY[base.__name__]} ({chosen.__name__}): {text}"
    return None


def _of_trainer(frame: FrameType, text: str) -> str:
    """The sentence that the Trainer's constructor refuses an argument with, after the argument and its value."""
    code, given = frame.f_code, frame.f_locals
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    found = {name: re.search(rf"\b{name.removesuffix('s')}s?\b", text) for name in names}
    places = {name: place.start() for name, place in found.items() if place}
    of_value = (name for name in names if isinstance(given[name], str) and given[name] in text)
    name = min(places, key=places.__getitem__) if places else next(of_value, "")
    got = f"got {given[name]!r}; " if isinstance(given.get(name), str | int | float) else ""
    return f"trainer{'.' if name else ''}{name}: {got}{text}"


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested dicts and lists, each with its path.

    Args:
        node: The dict or list.
        path: Where it stands itself.
    """
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        below = f"{path}.{key}" if path else str(key)
        yield below, value
        yield from walk(value, below)
