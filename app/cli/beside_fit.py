"""Verbs that take the options of `fit` and end before training. Tested by tests/contract/test_data.py, test_plan.py."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from app.cli.parsing.command_words import options_in_order
from app.cli.parsing.verb_parser import JSON_FLAG, parser_of
from app.cli.train import LayerSkipCLI, make_cli

_FLAGS: dict[str, dict[str, Any]] = {
    "json": JSON_FLAG,
    "check_resume": {"action": "store_true", "help": "Resume a fresh stream where this one stopped, and compare."},
}


class BesideFitCLI(LayerSkipCLI):
    """`fit` up to the point where training would begin, for a verb that has options of its own."""

    def __init__(self, *args: Any, verb: str, options: Any, **kwargs: Any) -> None:
        self._verb, self._options = verb, options
        super().__init__(*args, **kwargs)

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        self._subcommand_parsers["fit"].prog = f"layerskip {self._verb}"  # named in errors


def run_beside_fit(kind: type[BesideFitCLI], verb: str, options: type[Any], *, fixed: Sequence[str] = ()) -> None:
    """Run a verb whose own options are the fields of `options`, and some of `fit` are fixed."""
    own, rest = _split(options, verb, sys.argv[2:])
    sys.argv[1:] = ["fit", *rest, *fixed]
    make_cli(partial(kind, verb=verb, options=own))


def _split(options: Callable[..., Any], verb: str, args: Sequence[str]) -> tuple[Any, list[str]]:
    """Return the verb's own options, and the arguments that are left for `fit`."""
    parser = parser_of(options, verb, {name: _FLAGS[name] for name in _FLAGS if name in options.__annotations__})
    parser.epilog = "All options of `layerskip fit` are taken too: --config FILE, --trainer.max_steps N, ..."
    own, rest, actions = list[str](), list[str](), parser._option_string_actions
    for words, option, _ in options_in_order(args, lambda name: name in actions and actions[name].nargs != 0):
        if option in actions:
            own.append("=".join(words))
        else:
            rest += words
    return options(**parser.parse_args(own).as_dict()), rest
