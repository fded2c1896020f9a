"""What `layerskip VERB --help` prints, kept between calls: only the real parser knows it, and that loads Lightning.

A text is made anew where the application's files, or the packages whose options it shows, have changed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from app.whole_file import write_whole

_PACKAGES = ("jsonargparse", "lightning", "torch", "transformers")  # the texts show their signatures and docstrings
_ROOMS = ("app", "callbacks", "datamodules")
_OPTION = re.compile(r"(?m)^ +(?:-\w(?: \S+)?, )?--([\w.]+)\+?(?:[ =](\{[^}]*\}))?")


def kept_help(verb: str) -> str | None:
    """The help text of a verb, or None where it has to be made first."""
    try:
        kept: dict[str, Any] = json.loads(_file(verb).read_text("utf-8"))
    except (OSError, RuntimeError, ValueError):  # there is none, or no home, or a damaged one
        return None
    return str(kept["text"]) if kept.get("made_from") == _made_from() else None


def keep_help(verb: str, text: str) -> None:
    """Store the help text of a verb; a home that cannot be written to costs time at the next call, and no more."""
    try:
        file = _file(verb)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(file, json.dumps({"made_from": _made_from(), "text": text}))
    except (OSError, RuntimeError):
        return


def options_in(text: str) -> dict[str, tuple[str, ...]]:
    """The options that a help text lists, without dashes, each with its values where the text lists those, too."""
    options: dict[str, tuple[str, ...]] = {}
    for name, values in _OPTION.findall(text):
        options[name] = options.get(name) or tuple(filter(None, values.strip("{}").split(",")))
    return options


def _file(verb: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return cache / "layerskip" / f"help-{verb}.json"


def _made_from() -> list[str]:
    """All that a text depends on: this installation's files and releases."""
    top = Path(__file__).parents[3]
    files = [file for room in _ROOMS for file in (top / room).rglob("*.py")]
    latest = max(file.stat().st_mtime_ns for file in files)
    releases = [version(package) for package in _PACKAGES]
    return [str(top), sys.prefix, platform.python_version(), *releases, str(len(files)), str(latest)]
