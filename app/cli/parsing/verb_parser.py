"""Parsers whose options are a function's arguments. Tested by tests/contract/test_generate_mistakes.py."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from inspect import signature
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NoReturn

from jsonargparse import (  # type: ignore[attr-defined]  # ActionConfigFile is in its __all__ by computation
    ActionConfigFile,
    ArgumentParser,
)

from app.cli.parsing.parser_messages import one_line
from app.cli.parsing.several import Collect

_log = logging.getLogger(__name__)

JSON_FLAG: dict[str, Any] = {"action": "store_true", "help": "Print one JSON object instead of tables."}


class OneLineErrors(ArgumentParser):
    """A parser that prints an error as one line, says where help is, and exits with status 2."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Report two errors that jsonargparse lets pass: a config that is not UTF-8, and one that contains itself.

        Warn where an option is given several lists, since the last one counts alone.
        """
        words = args[0] if args else kwargs.get("args")
        for option, lists in _lists(sys.argv[1:] if words is None else words).items():
            action = self._option_string_actions.get(option)
            if len(lists) > 1 and action is not None and not isinstance(action, Collect):
                _log.warning("%s is given %d lists: only the last one counts, %s", option, len(lists), lists[-1])
        try:
            return super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            self.error(f"Problems parsing config: {error}", error)
        except RecursionError as error:
            self.error("Problems parsing config: a value contains itself, or is nested too deeply", error)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser = self._of_verb()
        options = {option.strip("-+") for option in parser._option_string_actions}
        name = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"error: {one_line(message, options=options)}\n(options: {name} --help)\n")
        self.exit(2)

    def _of_verb(self) -> ArgumentParser:
        """Return the parser of the training verb on the command line; the other verbs have no parser below this one."""
        for action in self._actions:
            if isinstance(action.choices, dict):
                return next((action.choices[arg] for arg in getattr(self, "args", ()) if arg in action.choices), self)
        return self


def _lists(args: Sequence[str]) -> dict[str, list[str]]:
    """Return the different lists that each option on a command line is given, in their order.

    An option that ends in "+" adds to a list, so that all of its lists count.
    """
    found: dict[str, dict[str, None]] = {}
    for word, following in pairwise([*args, ""]):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option.startswith("--") and not option.endswith("+") and value.startswith("["):
            found.setdefault(option, {})[value] = None
    return {option: [*lists] for option, lists in found.items()}


def call_verb(
    verb: Callable[..., None],
    *,
    by_hand: Mapping[str, dict[str, Any]] | None = None,
    positional: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Call the function of a verb with the options on the command line, which follow the verb, as its arguments.

    An argument whose type is a dataclass stands for the fields of that. `by_hand` has settings of `add_argument` for
    those that the signature does not describe well, `positional` of those that are no options.
    """
    parser = parser_of(verb, verb.__name__, by_hand or {}, positional or {})
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with these options.")
    options = parser.parse_args(sys.argv[2:]).as_dict()
    options.pop("config")
    for name, kind in _shared_options(verb).items():
        options[name] = kind(**{field.name: options.pop(field.name) for field in fields(kind)})
    verb(**options)


def parser_of(
    kind: Callable[..., Any],
    verb: str,
    by_hand: Mapping[str, dict[str, Any]],
    positional: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> OneLineErrors:
    """Return a parser whose options are the arguments of a function or class, described by its docstring."""
    parser = OneLineErrors(prog=f"layerskip {verb}", description=(kind.__doc__ or "").splitlines()[0])
    for name, settings in {**positional, **{f"--{name}": settings for name, settings in by_hand.items()}}.items():
        parser.add_argument(name, **settings)
    add = parser.add_class_arguments if isinstance(kind, type) else parser.add_function_arguments
    shared = _shared_options(kind)
    add(kind, as_group=False, skip={*by_hand, *positional, *shared})
    for options in shared.values():
        parser.add_class_arguments(options, as_group=False)
    return parser


def _shared_options(kind: Callable[..., Any]) -> dict[str, type[Any]]:
    """Return the arguments that stand for options of several verbs, each with the dataclass whose fields these are."""
    types = {name: parameter.annotation for name, parameter in signature(kind).parameters.items()}
    return {name: each for name, each in types.items() if isinstance(each, type) and is_dataclass(each)}
