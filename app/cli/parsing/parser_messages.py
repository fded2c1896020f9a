"""Turns jsonargparse's messages, which are trees of types, into one line: field, got, allowed, fix.

Example: 'Parser key "data": ... Parser key "batch_size": ... Expected a <class 'int'>. Got value: abc' becomes
'data.batch_size: got abc, allowed int (a whole number)'. Messages that users rarely meet keep jsonargparse's words.
Tested by tests/contract/test_command_line.py and test_generate_mistakes.py.
"""

import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import is_dataclass
from difflib import get_close_matches
from textwrap import shorten
from typing import Any

_KEY = re.compile(r'Parser key "([^"]+)":?')
_BASE = re.compile(r"<class '(\w+\.[\w.]+)'>|Callable\[\[.*?\], ([\w.]+)\]")
# jsonargparse also tries a base class with the given keys. If that class is denied, the user did not name it.
_DENIED = re.compile(r"^ *- Problem with given class_path '([^']+)':\n +Importing .*\n", re.MULTILINE)
# A type that no config can hold, with jsonargparse's remarks on it.
_TENSOR = re.compile(r", <class 'torch\.Tensor'>\]\n(?s:.*?)(?=Given value:)")
_UNION = re.compile(r"(?s:.*)Subtypes: \[(.+)\]\n(?s:.*?)Given value: (.*?)(?:\. Got value|\n|$)")  # the innermost
_UNKNOWN = re.compile(r"(?:^unrecognized arguments: --|[Oo]ption ')([^\s=']+)(?:' is not accepted)?")
_NOT_CLASS = (
    r"Expected a dot import path string: ([^\n]*)",
    r"Problem with given class_path '([^']+)':\s+(?:module \S+ has no attribute|No module named)",
    r"expects a function or a callable class: (?:.*class_path='([^']+)'|.*Got value: (.*))",
    r"Import path does not correspond to a subclass of (?s:.*?)Given value: (.*)",
)
_BEFORE_CLASS = re.compile(r"NestedArg\(key='([^']+)', val=(.*?)\)(?:\.? Got value|\n|$)")
_NOT_TYPE = r"Expected an? (?!<class 'NoneType'>)(.+?)\. Got value: (.*?)(?:\. Got value: Namespace|\n|$)"
_MEANINGS = {"int": "int (a whole number)", "float": "float (a finite number)", "bool": "true | false", "tuple": "list"}
_BASES = {"model.optimizer": "torch.optim.optimizer.Optimizer"}  # jsonargparse does not tell it of a bare name
# Names that other applications of LightningCLI have for settings of ours.
_KEYS_OF_OTHERS = {
    r"optimizer\b": "the optimizer is model.optimizer, as in --model.optimizer torch.optim.AdamW",
    r"lr_scheduler\b": "the learning rate's schedule is model.lr_schedule, with model.warmup_steps",
    r"model\.init_args\.(.+)": r"the model is of one class, LayerSkipModule, and has no init_args: model.\1",
    r"model\.class_path": "the model is of one class, LayerSkipModule: its settings are model.KEY",
}


def one_line(text: str, *, options: Collection[str] = ()) -> str:
    """Return the message in one line; one that no rule knows keeps its words. Near names of `options` are suggested."""
    given = text.rpartition("Given value:")[2]
    text = _DENIED.sub(lambda found: found[0] if found[1] in given else "", _TENSOR.sub("]\n", text))
    path = ".".join(dict.fromkeys(_KEY.findall(text)))
    owners = re.findall(r"Problem with given class_path '([^']+)'", text)
    if path.startswith("data.sources") and (name := _source(text)):
        path = path.replace("sources", f"sources.{name}")
    if found := re.search(r"Importing '([^']+)' is not allowed", text):
        package = found[1].partition(".")[0]
        allowed = "a class of this application or one it knows to be harmless (app/cli/parsing/allowed_classes.py)"
        fix = f"if you trust {package}, add --allowed_classes+ {package} to the command line, at every start"
        return f"{path}: got {found[1]}, allowed {allowed}; {fix}"
    if (found := _BEFORE_CLASS.search(text)) and _names_no_class(text):
        allowed = "allowed after the class that takes it"
        fix = f"put --{path} CLASS, or the --config that names the class, before it"
        return f"{path}.{found[1]}: got {found[2]}, {allowed}; {fix}"
    if found := _UNKNOWN.search(text):
        return _unknown_key(f"{path}.{found[1]}".lstrip("."), options, of=owners[-1] if owners else "")
    if found := re.search(r"the following arguments are required: (.*)", text):
        names = [rest if (rest := name.partition(".")[2]) in options else name for name in found[1].split(", ")]
        by = f" by {owners[-1]}" if owners else ""
        return f"{', '.join(f'{path}.{name}'.lstrip('.') for name in names)}: required{by}, but not given"
    if "'str' object does not support item assignment" in text:
        return f"{path}: got one text, allowed a list of texts; write [text]"
    if found := re.search(r"Not a valid subclass of (\w+)\. Got value: (.*)", text):
        return f"{path}: got {found[2]}, allowed the settings of a {found[1]}"
    if "unsupported operand type(s) for +: 'int' and 'str'" in text:  # PyYAML reads 3:1 as minutes and seconds
        return f"{path}: got a key without a value, allowed {{KEY: VALUE}}; write a blank behind the colon"
    if path == "data.sources" and (found := re.search(r"NestedArg\(key='sources\.([^']+)', val=(.*?)\)(?:\n|$)", text)):
        return f"{path}.{found[1]}: got {found[2]}, allowed the settings of a Source"
    for pattern in _NOT_CLASS:
        if found := re.search(pattern, text):
            return f"{path}: {_no_class(next(filter(None, found.groups()), ''), text, _BASES.get(path))}"
    if found := re.search(_NOT_TYPE, text) or _UNION.search(text):
        return f"{path}: {_wrong_type(_plain(found[1]), found[2])}"
    if found := re.search(r"Unable to load config '(.*)'", text):
        fix = "; the model that a run begins with is model.pretrained" if path == "model" else ""
        return f"{path}: got {found[1]!r}, allowed its keys, as in --{path}.KEY VALUE{fix}"
    if found := re.match(r"(Problems parsing|Unexpected) config: (?s:(.*))", text):
        got = shorten(found[2], 200)
        if found[1] == "Unexpected":
            return f"config: got {got!r}, allowed YAML of the form 'option: value'"
        return f"config: not YAML ({got})"
    if path:
        lines = (line.strip(" -") for line in _KEY.sub("", text).splitlines())
        text = f"{path}: {next(filter(None, lines), '')}"
    return re.sub(r"^argument --(\S+:)", r"\1", shorten(text, 400))


def _unknown_key(path: str, options: Collection[str], *, of: str = "") -> str:
    """Say that there is no such key (of the class `of`), and what it is called here or which keys are like it."""
    for pattern, key in _KEYS_OF_OTHERS.items():
        if other := re.match(pattern, path):
            return f"{path}: unknown key; {other.expand(key)}"
    owner, _, name = path.rpartition(".")
    siblings = [option.removeprefix(f"{owner}.") for option in options if option.rpartition(".")[0] == owner]
    return f"{path}: unknown key{f' of {of}' if of else ''}{_nearest(name.replace('-', '_'), siblings, cutoff=0.5)}"


def _nearest(name: str, names: Collection[str], *, cutoff: float) -> str:
    near = get_close_matches(name, sorted(names), cutoff=cutoff)
    return f"; nearest: {', '.join(near)}" if near else ""


def _source(text: str) -> str:
    """Name the source of data that is refused. jsonargparse tells it only as a part of all that is given."""
    if not (tried := re.search(r"datamodules\.Source'|subclass of (Source)\.", text)):
        return ""
    unknown = _UNKNOWN.search(text)
    key = unknown[1] if unknown else _KEY.findall(text)[-1]
    value = re.search(r"(?:Given|Got) value: (.*)", text)  # the innermost
    got = re.escape(value[1]) if value and not unknown else ""
    entry = "" if tried[1] else rf"\{{[^{{}}]*'{key}': "
    found = re.search(
        rf"key='sources\.([^']+?)(?:\.{key})?'|sources'.*?'([^']+)': {entry}'?{got}"
        r"|'([^']+)': Namespace\(class_path='datamodules\.Source', init_args=Namespace\(kind=None",  # it is required
        text,
    )
    return next(filter(None, found.groups()), "") if found else ""


def _names_no_class(text: str) -> bool:
    """Tell whether jsonargparse tried the settings on the base classes alone, since no class was given."""
    paths = re.findall(r"class_path[ =]'([^']+)'", text)
    if any(is_dataclass(_class_at(path)) for path in paths):
        return False  # a group of settings, which is of one class
    tried = {path.rpartition(".")[2] for path in paths}
    return tried <= {(base or result).rpartition(".")[2] for base, result in _BASE.findall(text)}


def _no_class(got: str, text: str, base: str | None) -> str:
    """Say which classes may be named; `base` is the path of their base class where the text does not tell it."""
    if got.startswith("Namespace("):
        return "got settings alone, allowed the class before them, as in --model.optimizer torch.optim.AdamW"
    union = _UNION.search(text)
    bases = [module or result for module, result in _BASE.findall(union[1] if union else text)] or list(
        filter(None, [base])
    )
    names = {cls.__name__ for base in bases for cls in _subclasses(base) if not cls.__name__.startswith("_")}
    of = " | ".join(base.rpartition(".")[2] for base in bases) or "a class, as module.Class"
    return f"got {got}, allowed the class path of {of}{_nearest(got.rpartition('.')[2], names, cutoff=0.0)}"


def _subclasses(base: str) -> Iterator[type]:
    pending = [_class_at(base)]
    while pending:
        if isinstance(cls := pending.pop(), type):
            pending += cls.__subclasses__()
            yield from cls.__subclasses__()


def _class_at(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _wrong_type(allowed: str, got: str) -> str:
    open_list = re.fullmatch(r"tuple|list(\[\w+\])?", allowed) and not (got.startswith("[") and got.endswith("]"))
    fix = f"; write [{got.strip('[] ,')}], in quotes if there are spaces" if open_list else ""
    return f"got {shorten(got, 200) or repr(got)}, allowed {_MEANINGS.get(allowed, allowed)}{fix}"


def _plain(types: str) -> str:
    """Write types in plain words: without modules, None and typing.Literal."""
    types = re.sub(
        r", (?=<class |typing\.|list\[|dict\[|collections\.)", " | ", types.removesuffix(", <class 'NoneType'>")
    )
    types = re.sub(r"<class '([^']+)'>", r"\1", types)
    types = re.sub(r"typing\.Literal\[([^]]*)\]", lambda found: found[1].replace("'", "").replace(", ", " | "), types)
    types = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", types)
    return re.sub(r"Callable\[\[\w+\], (\w+)\]", r"the class path of \1", types)
