"""The texts of `layerskip VERB --help`, kept between calls, since the parsers that make them load Lightning.

A text is made again when the files of this application, or the packages whose options it shows, have changed. The shell
completes verbs, options and values from the texts. Tested by tests/contract/test_start_up.py.
"""

import json
import os
import platform
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import argcomplete
from argcomplete.completers import DirectoriesCompleter

from app.whole_file import write_whole

_PACKAGES = ("jsonargparse", "lightning", "torch", "transformers")  # their docstrings are in the texts
_ROOMS = ("app", "callbacks", "datamodules")
_OPTION = re.compile(r"(?m)^ +(?:-\w(?: \S+)?, )?--([\w.]+)\+?(?:[ =]\{([^}]*)\})?")


def kept_help(verb: str) -> str | None:
    """Return the help text of a verb, or None if it has to be made first."""
    try:
        kept: dict[str, Any] = json.loads(_file(verb).read_text("utf-8"))
    except (OSError, RuntimeError, ValueError):  # there is no file or no home, or the file is damaged
        return None
    return str(kept["text"]) if kept.get("made_from") == _made_from() else None


def keep_help(verb: str, text: str) -> None:
    """Store the help text of a verb. If that fails, the next call has to make the text again, which takes seconds."""
    try:
        file = _file(verb)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(file, json.dumps({"made_from": _made_from(), "text": text}))
    except (OSError, RuntimeError):
        return


def options_in(text: str) -> dict[str, tuple[str, ...]]:
    """Return the options in a help text, without dashes, each with its values if the text lists them."""
    options: dict[str, tuple[str, ...]] = {}
    _, *parts = _OPTION.split(text)
    for name, values, described in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        listed = values.split(",") if values else _values_of_type(described)
        options[name] = options.get(name) or tuple(dict.fromkeys(listed))
    return options


def required_in(text: str) -> list[str]:
    """Return the options in a help text, without dashes, that a command line must have."""
    _, *parts = _OPTION.split(text)
    return [name for name, described in zip(parts[::3], parts[2::3], strict=True) if "(required," in described]


def _values_of_type(described: str) -> list[str]:
    """Return the values that the type in an option's description lists, such as `Optional[Literal['fixed', 'off']]`."""
    kind = "".join(described.partition("(type:")[2].split()).partition(",default:")[0]  # lines may break within a name
    listed = [value.strip("'") for values in re.findall(r"Literal\[(.*?)\]", kind) for value in values.split(",")]
    return listed + ["true", "false"] * ("bool" in kind)


def takes_folders(text: str) -> bool:
    """Whether a help text lists arguments that are no options, which are folders in every verb."""
    return "\npositional arguments:\n" in text


def complete(
    verbs: Iterable[str],
    options_of: Callable[[str], Mapping[str, tuple[str, ...]]],
    folders_of: Callable[[str], bool],
) -> None:
    """Answer a shell that asks for completions, and end the process; return at once if no shell asks.

    The user turns this on with `eval "$(register-python-argcomplete layerskip)"`. `options_of` gives the options of a
    verb, without dashes, each with its values where these are few; `folders_of` tells whether it also takes folders.
    """
    if "_ARGCOMPLETE" not in os.environ:
        return
    words = os.environ["COMP_LINE"].split()
    parser = ArgumentParser(prog="layerskip")
    below = parser.add_subparsers()
    for verb in verbs:
        own = below.add_parser(verb, allow_abbrev=False)
        if verb not in words[1:2]:
            continue
        if folders_of(verb):
            folders: Any = own.add_argument("folders", nargs="*")
            folders.completer = DirectoriesCompleter()
        for option, values in options_of(verb).items():
            if option != "help":
                own.add_argument(f"--{option}", choices=values or None)
    argcomplete.autocomplete(parser)


def _file(verb: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return cache / "layerskip" / f"help-{verb}.json"


def _made_from() -> list[str]:
    """Return the state of this installation's files and packages, on which a text depends."""
    top = Path(__file__).parents[3]
    files = [file for room in _ROOMS for file in (top / room).rglob("*.py")]
    latest = max(file.stat().st_mtime_ns for file in files)
    releases = [version(package) for package in _PACKAGES]
    return [str(top), sys.prefix, platform.python_version(), *releases, str(len(files)), str(latest)]
