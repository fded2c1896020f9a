"""Reads tokenizers, and checks them against a model's vocabulary or another model's tokenizer."""

import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from app.errors import ConfigError, shortened

# Entries that only pad a vocabulary, such as [PAD151936], <unused7>, <|reserved_special_token_9|>, <pad>.
_FILLER = re.compile(r"[\[<].*(pad|unused|reserved|extra|dummy).*[\]>]", re.IGNORECASE)


def tokenizer_to_files(tokenizer: Any) -> dict[str, str]:
    """A tokenizer as {file name: text}, plain enough for a weights-only checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_text("utf-8") for file in sorted(Path(folder).iterdir()) if file.is_file()}


def tokenizer_from_files(files: Mapping[str, str]) -> Any:
    """The inverse of `tokenizer_to_files`; it raises ValueError for a name that leads out of the folder."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not the name of a file")
            (Path(folder) / name).write_text(text, "utf-8")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(path: str, *, field: str) -> Any:
    """The tokenizer of a Hugging Face directory or hub id; ConfigError if there is none that can be read."""
    allowed = "a model with a tokenizer (tokenizer.json, or what its class needs)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not isinstance(longest := tokenizer.model_max_length, int | float) or not longest >= 1:
            raise ValueError(
                f"{TOKENIZER_CONFIG_FILE}: model_max_length: got {longest!r}, allowed a number, at least 1"
            )
        tokenizer.decode(tokenizer("a")["input_ids"])  # what fails shows before a model is loaded
    except Exception as error:  # their readers raise anything
        fix = f"its tokenizer cannot be read: {shortened(error)}"
        raise ConfigError(field, got=path, allowed=allowed, fix=fix) from error
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # what transformers makes of some classes without files
        raise ConfigError(field, got=path, allowed=allowed, fix="copy the files of the tokenizer it was trained with")
    return tokenizer


def check_fits(tokenizer: Any, *, vocab_size: int, field: str, got: str) -> None:
    """Raise ConfigError if the tokenizer has ids that the model of `vocab_size` has no embedding for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        allowed = f"a model with a tokenizer of ids below its vocab_size ({vocab_size})"
        fix = f"this tokenizer has ids up to {largest}: use the one that the model was trained with"
        raise ConfigError(field, got=got, allowed=allowed, fix=fix)


def check_same_tokens(
    target_tokenizer: Any,
    draft_tokenizer: Any,
    *,
    got: str,
    field: str = "draft_model",
    names: tuple[str, str] = ("target", "draft"),
) -> None:
    """Raise ConfigError, for the model `field` with the value `got`, unless an id means the same token to both models.

    Entries that only pad one vocabulary at its end (`[PAD7]`, `<unused7>`, ...) may be missing in the other. The error
    calls the two models by `names`.
    """
    target, draft = target_tokenizer.get_vocab(), draft_tokenizer.get_vocab()
    end = min(max(target.values()), max(draft.values()))
    vocabularies = dict(zip(names, (target, draft), strict=True))
    if differences := _told(target.items() ^ draft.items(), end, **vocabularies):
        raise ConfigError(field, got=got, allowed=f"a model with the {names[0]}'s tokenizer", fix=differences)


def check_knows_tokens(tokenizer: Any, own_tokenizer: Any, *, got: str, model: str) -> None:
    """Raise ConfigError unless every token of a model has the same id in the tokenizer that is to feed it.

    The tokenizer may have more tokens at its end, such as those that a datamodule adds for a task, and may lack
    entries that only pad the model's vocabulary at its end. The error is about `tokenizer` with the value `got`, and
    names the model's path `model`.
    """
    given, own = tokenizer.get_vocab(), own_tokenizer.get_vocab()
    if differences := _told(own.items() - given.items(), max(given.values()), model=own, tokenizer=given):
        allowed = f"the tokenizer of {model}, which is continued"
        raise ConfigError("tokenizer", got=got, allowed=allowed, fix=f"name {model} itself; {differences}")


def _told(entries: Iterable[tuple[str, int]], end: int, **vocabularies: Mapping[str, int]) -> str:
    """The differences of two vocabularies in words, without padding behind `end`; empty if there are none."""
    differing = sorted((idx, token) for token, idx in entries if idx <= end or not _FILLER.fullmatch(token))
    if not differing:
        return ""
    token = differing[0][1]
    ids = ", ".join(f"{name}: {vocabulary.get(token, 'no id')}" for name, vocabulary in vocabularies.items())
    sizes = " and ".join(f"{len(vocabulary)} tokens in the {name}'s" for name, vocabulary in vocabularies.items())
    return f"{len(differing)} entries differ; the first is {token!r} ({ids}), with {sizes} vocabulary"
