"""Config files that are stacked on others: a file's `config` lists those below it, by paths relative to the file.

`config: [../data/text_code.yaml, ../trainer/ddp.yaml]` in a file means what these options mean before the file's own:
`--config ../data/text_code.yaml --config ../trainer/ddp.yaml`. jsonargparse itself takes a `config` in a file, too, but
whole groups of the file then replace those of the included one: settings would go missing without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from app.errors import ConfigError

_KEY = "config"
_OPTIONS = ("--config", "-c")


def with_included(args: Sequence[str]) -> list[str]:
    """The arguments, with each `--config FILE` preceded by one for every file that FILE is stacked on.

    Args:
        args: The command line, without the program's name.

    Raises:
        ConfigError: A file's `config` is not a list of files, or leads back to the file.
    """
    return list(_expanded(iter(args)))


def _expanded(args: Iterator[str]) -> Iterator[str]:
    for arg in args:
        option, equals, value = arg.partition("=")
        if option not in _OPTIONS or (not equals and not (value := next(args, ""))):
            yield arg
            continue
        for file in _stack(value, above=()):
            yield from ("--config", file)


def _stack(file: str, *, above: tuple[Path, ...]) -> Iterator[str]:
    """`file` and all below it, the lowest first."""
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
    """What is in the file; None where the parser, which reads it next, will say what is wrong with it."""
    try:
        return get_loader("yaml")(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
