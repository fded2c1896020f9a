"""Refuses paths that cannot be models before torch is loaded. Tested by tests/unit/model_files/test_open.py."""

import re
from pathlib import Path

from app.errors import ConfigError

SOURCES = (
    "a Hugging Face directory (or hub id) with config.json and safetensors weights, a .gguf file, "
    "or a checkpoint of layerskip fit (a .ckpt file or a directory)"
)
TOKENIZERS = (
    "a directory (or hub id) with a tokenizer (tokenizer.json, or what its class needs), a .gguf file, "
    "or a checkpoint of layerskip fit"
)
_FILES = (".gguf", ".ckpt")
_FOLDERS = ("models", "runs")  # which the configs here use; they are nobody's names on the hub
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def check_exists(path: str, *, field: str, allowed: str = SOURCES) -> None:
    """Raise ConfigError, naming the setting `field`, for an absent path that cannot be a model's id on the hub."""
    given, (first, slash, _) = Path(path), path.partition("/")
    is_here = bool(slash) and (first in _FOLDERS or Path(first).is_dir())  # though it has the form of a hub id
    if not given.exists() and (given.suffix in _FILES or is_here or not _HUB_ID.fullmatch(path)):
        raise ConfigError(field, got=path, allowed=allowed, fix="no such file or directory")
