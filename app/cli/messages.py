"""From an exception to the one message a user needs, with the full path of the field."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

from app.cli.faults import fault_message
from app.errors import ConfigError, UserError, causes

_LIGHTNINGS = "MisconfigurationException"  # by name: verbs that decode do without loading Lightning

_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_DISKS = (*_FULL, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)  # with or without a file's name


class LocatedError(UserError):
    """A ConfigError whose field is written as its path in the configuration."""


def user_message(error: BaseException) -> str | None:
    """The message for an error the user can mend, or None if it is a bug of ours."""
    if isinstance(error, UserError) or type(error).__name__ == _LIGHTNINGS:
        return str(error)
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
        return LocatedError(str(raised_from[-1]))
    named = [(path, value) for path, value in _walk(config, "") if path.rsplit(".", 1)[-1] == cause.field]
    paths = [path for path, value in named if value == cause.got] or [path for path, _ in named]
    return LocatedError(cause.message(paths[0] if len(paths) == 1 else cause.field))


def _walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        below = f"{path}.{key}" if path else str(key)
        yield below, value
        yield from _walk(value, below)
