"""The parser of Lightning's verbs. Tested by tests/contract/test_command_line.py."""

import re
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import yaml
from jsonargparse import set_dumper
from lightning.pytorch.cli import LightningArgumentParser

from app.cli.parsing.allowed_classes import restrict_classes
from app.cli.parsing.command_words import options_in_order
from app.cli.parsing.included_configs import with_included
from app.cli.parsing.preflight import CHECKPOINT_HELP
from app.cli.parsing.verb_parser import OneLineErrors

_NAME_OR_CLASS = re.compile(r"--(trainer)\.(strategy|accelerator|profiler|plugins)")


class _Dumper(yaml.SafeDumper):
    """Writes the members of an Enum by their values; some of Lightning's defaults are such members."""


_Dumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def _dump(data: Any) -> str:
    return str(yaml.dump(data, Dumper=_Dumper, allow_unicode=True, sort_keys=False))


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """Takes stacked configs, lets them name allowed classes only, and reports an error in one line."""

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        added: list[str] = super().add_method_arguments(*args, **kwargs)
        if "ckpt_path" in added:  # Lightning's help does not know the values last and auto
            self._option_string_actions["--ckpt_path"].help = CHECKPOINT_HELP
        return added

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        if "namespace" in kwargs:  # the parser of all verbs calls that of one, with the arguments that are made below
            return super().parse_args(*args, **kwargs)
        set_dumper("yaml", _dump)
        given, *rest = args or (None,)
        own = restrict_classes(sys.argv[1:] if given is None else given)
        return super().parse_args(list(_classes_as_configs(with_included(own))), *rest, **kwargs)


def _classes_as_configs(args: Sequence[str]) -> Iterator[str]:
    """Yield the arguments, with `--trainer.strategy '{class_path: ...}'` and its like written as configs.

    These settings may be names as well as classes. On the command line jsonargparse takes a misspelt class for a name,
    which Lightning then does not find; in a config it says what is wrong with the class.
    """
    for words, option, value in options_in_order(args, _NAME_OR_CLASS.fullmatch):
        if (found := _NAME_OR_CLASS.fullmatch(option)) and value and value.lstrip().startswith("{"):
            yield f"--config={{{found[1]}: {{{found[2]}: {value}}}}}"
        else:
            yield from words
