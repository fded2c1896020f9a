"""A parser whose errors are one line: path of the field, what it got, what is allowed."""

from __future__ import annotations

import re
import sys
from typing import NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

_KEY = re.compile(r'Parser key "([^"]+)"')
_TYPE = re.compile(r"Expected an? (.+?)\. Got value: (.*)")
_OPTIONAL = re.compile(r"Subtypes: \[(.+), <class 'NoneType'>\].*Given value: (.*)", re.DOTALL)
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")


def one_line(message: str) -> str:
    """The message of jsonargparse without its tree of subtypes; anything unknown is passed on as it is.

    Example: nested "Parser key "data" ... Parser key "batch_size" ... Expected a <class 'int'>. Got value: abc"
    becomes "data.batch_size: got abc, allowed int".
    """
    path = ".".join(_KEY.findall(message))
    if option := _OPTION.search(message):
        owner = _CLASS.findall(message)
        return f"{path}.{option[1]}: unknown key{f' of {owner[-1]}' if owner else ''}"
    if unknown := re.match(r"unrecognized arguments: --(\S+)", message):
        return f"{unknown[1]}: unknown key"
    if wrong := _TYPE.search(message) or _OPTIONAL.search(message):
        return f"{path}: got {wrong[2]}, allowed {_plain_type(wrong[1])}"
    return message


def _plain_type(name: str) -> str:
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", name)
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", name):
        return literal[1].replace("'", "").replace(", ", " | ")
    return name.replace("typing.", "")


class _OneLineErrors(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message in one line, say where help is, and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {one_line(message)}\n(options: {parser.prog.split(' [')[0]} --help)\n")
        self.exit(2)


class VerbParser(_OneLineErrors):
    """For our own verbs."""


class TrainingParser(_OneLineErrors, LightningArgumentParser):
    """For Lightning's verbs."""
