"""Config files that are stacked on others: a file's `config` lists those below it, by paths relative to the file.

`config: [../data/text_code.yaml, ../trainer/ddp.yaml]` in a file means the same as the options
`--config ../data/text_code.yaml --config ../trainer/ddp.yaml` before that file. jsonargparse also takes a `config` in a
file, but then a group of the file replaces the whole group of the included one, and settings go missing silently.
Tested by tests/contract/test_experiments.py.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from app.cli.parsing.command_words import options_in_order
from app.errors import ConfigError

_KEY = "config"
_OPTIONS = ("--config", "-c")
_INSTALLED = Path(__file__).parents[3]  # the folder of the packages, and of `configs` beside them


def with_installed(args: Sequence[str]) -> list[str]:
    """Take `configs/...` among the arguments from the installation where the working directory has no such file."""
    installed = (_INSTALLED / arg for arg in args)
    return [
        str(file) if arg.startswith("configs/") and not Path(arg).exists() and file.is_file() else arg
        for arg, file in zip(args, installed, strict=True)
    ]


def with_included(args: Sequence[str]) -> list[str]:
    """Return the arguments, with each `--config FILE` preceded by one for every file that FILE is stacked on."""
    expanded = list[str]()
    for words, option, value in options_in_order(args, _OPTIONS.__contains__):
        if option in _OPTIONS and value:
            words = [word for file in _stack(value, above=()) for word in ("--config", file)]
        expanded += words
    return expanded


def _stack(file: str, *, above: tuple[Path, ...]) -> Iterator[str]:
    """Yield `file` and all files below it, the lowest first."""
    path = Path(file).resolve()
    if path in above:
        raise ConfigError(_KEY, got=file, allowed=f"files that are not stacked on themselves, as {above[0]} is")
    content = _read(path)
    below = content.get(_KEY, []) if isinstance(content, dict) else []
    if not (isinstance(below, list) and all(isinstance(name, str) for name in below)):
        raise ConfigError(_KEY, got=below, allowed="a list of files", fix=f"mend it in {file}")
    for name in below:
        yield from _stack(str(Path(file).parent / name), above=(*above, path))
    yield file


def _read(path: Path) -> Any:
    """Return the content of the file, or None if it cannot be read: the parser, which reads it next, says why."""
    try:
        return get_loader("yaml")(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
