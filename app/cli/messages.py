"""From an exception to the one message a user needs, with the full path of the field."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

from app.cli.faults import fault_message
from app.errors import ConfigError, UserError

_LIGHTNINGS = "MisconfigurationException"  # by name: verbs that decode do without loading Lightning


class LocatedError(UserError):
    """A ConfigError whose field is written as its path in the configuration."""


def user_message(error: BaseException) -> str | None:
    """The message for an error the user can mend, or None if it is a bug of ours."""
    if isinstance(error, UserError) or type(error).__name__ == _LIGHTNINGS:
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error}; files written before are whole: make room and repeat (fit resumes with --ckpt_path auto)"
    return fault_message(error)


def locate(error: Exception, config: Any) -> LocatedError:
    """Complete the field to its path, found as the only place in `config` that holds the offending value.

    Args:
        error: Raised by a constructor, which knows its own argument's name but not where it was written;
            jsonargparse may have wrapped it.
        config: The parsed configuration as nested dicts and lists.
    """
    cause: BaseException = error
    while not isinstance(cause, ConfigError) and (below := cause.__cause__ or cause.__context__):
        cause = below
    if not isinstance(cause, ConfigError):
        return LocatedError(str(cause))
    named = [(path, value) for path, value in _walk(config, "") if path.rsplit(".", 1)[-1] == cause.field]
    paths = [path for path, value in named if value == cause.got] or [path for path, _ in named]
    return LocatedError(cause.message(paths[0] if len(paths) == 1 else cause.field))


def _walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        below = f"{path}.{key}" if path else str(key)
        yield below, value
        yield from _walk(value, below)
