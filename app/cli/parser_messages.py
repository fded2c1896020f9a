"""From jsonargparse's messages, which are trees of types, to one line: field, what it got, what is allowed, what to do.

Example: 'Parser key "data": ... Parser key "batch_size": ... Expected a <class 'int'>. Got value: abc' becomes
'data.batch_size: got abc, allowed int (a whole number)'.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from difflib import get_close_matches
from textwrap import shorten
from typing import NamedTuple

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_BASE = re.compile(r"<class '(\w+\.[\w.]+)'>|Callable\[\[.*?\], ([\w.]+)\]")
_NONE = "<class 'NoneType'>"
_UNION = re.compile(r"(?s:.*)Subtypes: \[(.+)\]\n(?s:.*?)Given value: (.*)")  # of nested ones the innermost
# Of an optimizer, which would take a tensor, too; no config holds one. What surrounds it adds its own 'Got value'.
_NUMBER = re.compile(
    r"Subtypes: \[(<class 'float'>), <class 'torch\.Tensor'>\]\n(?s:.*?)Given value: (.+?)(?:\. Got|\n|$)"
)
_MEANINGS = {"int": "int (a whole number)", "float": "float (a finite number)", "bool": "true | false"}


_CLASSES = {"model.optimizer": "torch.optim.AdamW"}
# What other applications of LightningCLI call settings of ours.
_KEYS_OF_OTHERS = {
    r"optimizer\b": "the optimizer is model.optimizer, as in --model.optimizer torch.optim.AdamW",
    r"lr_scheduler\b": "the learning rate's schedule is model.lr_schedule, with model.warmup_steps",
    r"model\.init_args\.(.+)": r"the model is of one class, LayerSkipModule, and has no init_args: model.\1",
    r"model\.class_path": "the model is of one class, LayerSkipModule: its settings are model.KEY",
}


class _Message(NamedTuple):
    """A message of jsonargparse; the classes whose arguments it is about; the options there are."""

    text: str
    owners: list[str]
    options: Collection[str]

    def path(self, *below: str) -> str:
        return ".".join((*_KEY.findall(self.text), *below))


def one_line(text: str, *, options: Collection[str] = ()) -> str:
    """The message in one line; one that is not understood is passed on as it is.

    Args:
        text: The message.
        options: Names of the parser's options, of which those near to a misspelt one are suggested.
    """
    message = _Message(text, _CLASS.findall(text), options)
    for pattern, say in _RULES.items():
        if found := re.search(pattern, text):
            return say(found, message)
    return text


def _unknown(found: re.Match[str], message: _Message) -> str:
    path = message.path(found[1])
    owner, _, name = path.rpartition(".")
    siblings = [option.removeprefix(f"{owner}.") for option in message.options if option.rpartition(".")[0] == owner]
    of = f" of {message.owners[-1]}" if message.owners else ""
    for pattern, key in _KEYS_OF_OTHERS.items():
        if other := re.match(pattern, path):
            return f"{path}: unknown key; {other.expand(key)}"
    return f"{path}: unknown key{of}{_nearest(name.replace('-', '_'), siblings, cutoff=0.5)}"


def _nearest(name: str, names: Iterable[str], *, cutoff: float) -> str:
    near = get_close_matches(name, sorted(names), cutoff=cutoff)
    return f"; nearest: {', '.join(near)}" if near else ""


def _stray(found: re.Match[str], _: _Message) -> str:
    return f"{found[1]}: belongs to no option; a text or a list with spaces goes in quotes"


def _required(found: re.Match[str], message: _Message) -> str:
    names = [rest if (rest := name.partition(".")[2]) in message.options else name for name in found[1].split(", ")]
    by = f" by {message.owners[-1]}" if message.owners else ""
    return f"{', '.join(map(message.path, names))}: required{by}, but not given"


def _no_value(found: re.Match[str], _: _Message) -> str:
    return f"{found[1]}: got no value; one that begins with a dash is written --{found[1]}=VALUE"


def _a_switch(found: re.Match[str], _: _Message) -> str:
    return f"{found[1]}: got {found[2]}, allowed no value: giving it switches it on"


def _no_config(found: re.Match[str], _: _Message) -> str:
    return f"config: got {found[2]}, allowed a YAML file ({found[1].lower()})"


def _no_options(found: re.Match[str], _: _Message) -> str:
    return f"config: got {shorten(found[1], 200)!r}, allowed YAML of the form 'option: value'"


def _no_yaml(found: re.Match[str], _: _Message) -> str:
    return f"config: not YAML ({shorten(found[1], 200)})"


def _no_list(_: re.Match[str], __: _Message) -> str:
    return "stop: got one text, allowed a list of texts; write [text]"  # the only option of several arguments


def _no_group(found: re.Match[str], message: _Message) -> str:
    path = message.path().split(".")[0]
    return f"{path}: got {found[1]}, allowed its keys, as in --{path}.KEY VALUE, or a YAML file of them"


def _no_class(found: re.Match[str], message: _Message) -> str:
    got = next(filter(None, found.groups()), "")
    if keys := re.fullmatch(r"Namespace\((?:init_args=Namespace\()?(.*?)\)+", got):
        name, allowed = message.path(), "its settings with its class"
        example = f"--{name} {_CLASSES.get(name, 'CLASS')}"
        return f"{name}: got {keys[1]} alone, allowed {allowed}; name that, too, and first: {example}"
    union = _UNION.search(message.text)
    bases = [module or result for module, result in _BASE.findall(union[1] if union else message.text)]
    names = {cls.__name__ for base in bases for cls in _subclasses(base) if not cls.__name__.startswith("_")}
    of = " | ".join(base.rpartition(".")[2] for base in bases) or "a class, as module.Class"
    near = _nearest(got.rpartition(".")[2], names, cutoff=0.0)
    return f"{message.path()}: got {_shown(got)}, allowed the class path of {of}{near}"


def _not_allowed(found: re.Match[str], message: _Message) -> str:
    allowed = "a class of this application or one it knows to be harmless (app/cli/allowed_classes.py)"
    package = found[1].partition(".")[0]
    fix = f"if you trust {package}, add --allowed_classes+ {package} to the command line"
    return f"{message.path()}: got {found[1]}, allowed {allowed}; {fix}"


def _subclasses(base: str) -> Iterator[type]:
    """Every subclass imported so far of a class named with its module."""
    module, _, name = base.rpartition(".")
    pending = [getattr(sys.modules.get(module), name, None)]
    while pending:
        if isinstance(cls := pending.pop(), type):
            pending += cls.__subclasses__()
            yield from cls.__subclasses__()


def _wrong_type(found: re.Match[str], message: _Message) -> str:
    allowed, got = _plain(found[1]), found[2]
    open_list = re.fullmatch(r"list(\[\w+\])?", allowed) and not (got.startswith("[") and got.endswith("]"))
    fix = f"; write [{got.strip('[] ,')}], in quotes if there are spaces" if open_list else ""
    return f"{message.path()}: got {_shown(got)}, allowed {_MEANINGS.get(allowed, allowed)}{fix}"


def _shown(got: str) -> str:
    return shorten(got, 200) if got.strip() else repr(got)


def _plain(types: str) -> str:
    """Types as one reads them: without modules, None and typing.Literal."""
    types = re.sub(r", (?=<class |typing\.|list\[|dict\[|collections\.)", " | ", types.removesuffix(f", {_NONE}"))
    types = re.sub(r"<class '([^']+)'>", r"\1", types)
    types = re.sub(r"typing\.Literal\[([^]]*)\]", lambda found: found[1].replace("'", "").replace(", ", " | "), types)
    types = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", types)
    return re.sub(r"Callable\[\[\w+\], (\w+)\]", r"the class path of \1", types)


# Patterns in the order of their trial.
_RULES: dict[str, Callable[[re.Match[str], _Message], str]] = {
    r"Importing '([^']+)' is not allowed": _not_allowed,
    r"Option '([^']+)' is not accepted": _unknown,
    r"^Subcommand '\w+' does not accept option '([^']+)'": _unknown,
    r"^unrecognized arguments: --([^\s=]+)": _unknown,
    r"^unrecognized arguments: (.*)": _stray,
    r"the following arguments are required: (.*)": _required,
    r"^argument --(\S+): expected .*argument": _no_value,
    r"^argument --(\S+): ignored explicit argument (.*)": _a_switch,
    r'^Parser key "config": ([^:]+): (.*)': _no_config,
    r"(?s)^Unexpected config: (.*)": _no_options,
    r"(?s)^Problems parsing config: (.*)": _no_yaml,
    r"^'str' object does not support item assignment": _no_list,
    r"Unable to load config '(.*)'": _no_group,
    _NUMBER.pattern: _wrong_type,
    r"Expected a dot import path string: (.*)": _no_class,
    r"Problem with given class_path '([^']+)':\s+(?:module \S+ has no attribute|No module named)": _no_class,
    r"expects a function or a callable class: (?:.*class_path='([^']+)'|.*Got value: (.*))": _no_class,
    r"Import path does not correspond to a subclass of (?s:.*?)Given value: (.*)": _no_class,
    rf"Expected an? (?!{_NONE})(.+?)\. Got value: (.*?)(?:\. Got value: Namespace|\n|$)": _wrong_type,
    _UNION.pattern: _wrong_type,
}
