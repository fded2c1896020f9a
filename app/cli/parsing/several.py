"""An option that may be given several times, each time with one text or several: all of them are taken.

Tested by tests/contract/test_lens.py.
"""

import argparse
from collections.abc import Sequence
from typing import Any


class _OnCommandLine(list[str]):
    """What the command line has said of an option so far, which replaces what a config file says of it."""


class Collect(argparse.Action):
    """Adds to what the command line said before of the option; argparse's "append" fails behind a config file."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest, None)
        kept = before if isinstance(before, _OnCommandLine) else ()
        setattr(namespace, self.dest, _OnCommandLine([*kept, *(values or ())]))


class _Texts:
    """The texts of one mention of the option: a text on the command line, a text or a list of them in a config file."""

    def __call__(self, value: object) -> list[str]:
        return list(map(str, value)) if isinstance(value, list) else [str(value)]

    def __repr__(self) -> str:
        return "str"  # what a help text names


SEVERAL_TIMES: dict[str, Any] = {"type": _Texts(), "action": Collect}  # one text each time
SEVERAL_AT_A_TIME: dict[str, Any] = {"type": str, "action": Collect, "nargs": "+"}
