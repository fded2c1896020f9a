"""The parser of Lightning's verbs: stacked configs, classes by name, one-line errors."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import yaml
from jsonargparse import set_dumper
from lightning.pytorch.cli import LightningArgumentParser

from app.cli.parsing.allowed_classes import restrict_classes
from app.cli.parsing.included_configs import with_included
from app.cli.parsing.preflight import CHECKPOINT_HELP
from app.cli.parsing.verb_parser import OneLineErrors

_NAME_OR_CLASS = re.compile(r"--(trainer)\.(strategy|accelerator|profiler|plugins)")


class _Dumper(yaml.SafeDumper):
    """Writes the members of an Enum, as some of Lightning's defaults are, by their values."""


_Dumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def _dump(data: Any) -> str:
    return str(yaml.dump(data, Dumper=_Dumper, allow_unicode=True, sort_keys=False))


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """For Lightning's verbs."""

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """As jsonargparse's; Lightning's help does not know all that `ckpt_path` takes here."""
        added: list[str] = super().add_method_arguments(*args, **kwargs)
        if "ckpt_path" in added:
            self._option_string_actions["--ckpt_path"].help = CHECKPOINT_HELP
        return added

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse's; a config file may be stacked on others (`app.cli.parsing.included_configs`)."""
        if "namespace" in kwargs:  # The parser of all verbs asks that of one, and has made its arguments below.
            return super().parse_args(*args, **kwargs)
        set_dumper("yaml", _dump)
        given, *rest = args or (None,)
        own = restrict_classes(sys.argv[1:] if given is None else given)
        return super().parse_args(list(_classes_as_configs(with_included(own))), *rest, **kwargs)


def _classes_as_configs(args: Sequence[str]) -> Iterator[str]:
    """The arguments, with `--trainer.strategy '{class_path: ...}'` and its like written as configs.

    jsonargparse takes what is no class for a name, which these settings may be too: Lightning then says that there is
    no strategy of the name '{class_path: ...}'. Of a config, it says what is wrong with the class.
    """
    rest = iter(args)
    for arg in rest:
        option, equals, value = arg.partition("=")
        found = _NAME_OR_CLASS.fullmatch(option)
        if not found or (not equals and (value := next(rest, None)) is None):  # type: ignore[assignment]
            yield arg
        elif value.lstrip().startswith("{"):
            yield f"--config={{{found[1]}: {{{found[2]}: {value}}}}}"
        else:
            yield from (arg,) if equals else (option, value)
