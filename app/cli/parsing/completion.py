"""Completion of verbs, options, values and files by argcomplete: `eval "$(register-python-argcomplete layerskip)"`."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping

import argcomplete


def complete(verbs: Iterable[str], options_of: Callable[[str], Mapping[str, tuple[str, ...]]]) -> None:
    """Answer a shell that asks what may come next, and end the process; return at once where none asks.

    Args:
        verbs: What may come first.
        options_of: The options of a verb, without dashes, each with its values where these are few.
    """
    if "_ARGCOMPLETE" not in os.environ:
        return
    words = os.environ["COMP_LINE"].split()
    parser = ArgumentParser(prog="layerskip")
    below = parser.add_subparsers()
    for verb in verbs:
        own = below.add_parser(verb, allow_abbrev=False)
        for option, values in options_of(verb).items() if verb in words[1:2] else ():
            if option != "help":
                own.add_argument(f"--{option}", choices=values or None)
    argcomplete.autocomplete(parser)
