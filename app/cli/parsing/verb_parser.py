"""Parsers whose errors are one line each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import (  # type: ignore[attr-defined]  # ActionConfigFile is in its __all__ by computation
    ActionConfigFile,
    ArgumentParser,
)

from app.cli.parsing.parser_messages import one_line


class OneLineErrors(ArgumentParser):
    """A parser that says what is wrong in one line, and where help is."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse's, which takes every file of settings for UTF-8, and follows aliases without end."""
        try:
            return super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            self.error(f"Problems parsing config: {error}", error)
        except RecursionError as error:
            self.error("Problems parsing config: a value contains itself, or is nested too deeply", error)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message in one line, say where help is, and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = self._of_verb()
        options = {option.strip("-+") for option in parser._option_string_actions}
        name = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"error: {one_line(message, options=options)}\n(options: {name} --help)\n")
        self.exit(2)

    def _of_verb(self) -> ArgumentParser:
        """The parser of Lightning's verb that was given; for our own verbs there is but one parser."""
        for action in self._actions:
            if isinstance(action.choices, dict):
                return next((action.choices[arg] for arg in getattr(self, "args", ()) if arg in action.choices), self)
        return self


def call_verb(
    verb: Callable[..., None], args: Sequence[str], *, by_hand: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Call the function of a verb with the options on the command line.

    Args:
        verb: Has the verb's name. Its arguments are the options, and the first line of its docstring describes it.
        args: What follows the verb on the command line.
        by_hand: Settings of `add_argument` by option, for those that the function's signature does not describe well.
    """
    by_hand = by_hand or {}
    parser = OneLineErrors(prog=f"layerskip {verb.__name__}", description=(verb.__doc__ or "").splitlines()[0])
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with these options.")
    for name, settings in by_hand.items():
        parser.add_argument(f"--{name}", **settings)
    parser.add_function_arguments(verb, as_group=False, skip={*by_hand})
    options = parser.parse_args(args).as_dict()
    options.pop("config")
    verb(**options)
