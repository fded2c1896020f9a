"""Paths of models, checked by their looks alone: a mistyped one is refused before torch and transformers are loaded."""

from __future__ import annotations

import re
from pathlib import Path

from app.errors import ConfigError

SOURCES = (
    "a Hugging Face directory (or hub id) with config.json and safetensors weights, a .gguf file, "
    "or a checkpoint of layerskip fit (a .ckpt file or a directory)"
)
_FILES = (".gguf", ".ckpt")
_FOLDERS = ("models", "runs")  # where the configs here have theirs; they are nobody's names on the hub
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def check_exists(path: str, *, field: str) -> None:
    """Refuse a path at which nothing is, unless it may be the id of a model on the hub.

    Args:
        path: As given for `field`.
        field: The setting, for the error message.

    Raises:
        ConfigError: There is no such file or directory.
    """
    given = Path(path)
    if not given.exists() and (given.suffix in _FILES or not _HUB_ID.fullmatch(path) or _is_local(path)):
        raise ConfigError(field, got=path, allowed=SOURCES, fix="no such file or directory")


def _is_local(path: str) -> bool:
    """Whether something of the form of a hub id is in a folder of this machine's instead: the hub need not be asked."""
    first, slash, _ = path.partition("/")
    return bool(slash) and (first in _FOLDERS or Path(first).is_dir())
