"""Prompts in: JSON lines to token ids, every mistake named by its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import DataError, check_range
from app.text.text_tokens import prompt_tokens

if TYPE_CHECKING:  # read before transformers is loaded: a file that is missing is refused at once
    from transformers import PreTrainedTokenizerBase


def read_prompts(path: str, *, limit: int | None = None) -> list[str]:
    """The prompts of a JSON lines file: one object a line, with a string `prompt`; blank lines do not count.

    Args:
        path: The file, UTF-8.
        limit: Read this many prompts, at least 1, and nothing after them; None reads all.

    Raises:
        DataError: The file cannot be read or holds no prompt, or a line of it is not such an object.
    """
    if limit is not None:
        check_range("limit", limit, low=1)
    prompts: list[str] = []
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if len(prompts) == limit:
                    break
                if line.strip():
                    prompts.append(_prompt(line, place=f"{path}, line {number}"))
    except OSError as error:
        raise DataError(f"prompts: {path} cannot be read: {error.strerror}") from error
    if not prompts:
        raise DataError(f'prompts: {path} holds no prompt; write one object a line, {{"prompt": "..."}}')
    return prompts


def _prompt(line: bytes, *, place: str) -> str:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise DataError(f'{place}: got {type(entry).__name__}, allowed an object with a string "prompt"')
    if "prompt" not in entry:
        raise DataError(f'{place}: no "prompt", only {sorted(entry)}')
    prompt = entry["prompt"]
    if not isinstance(prompt, str):
        raise DataError(f'{place}: "prompt" is {type(prompt).__name__}, allowed a string')
    if not prompt:
        raise DataError(f'{place}: "prompt" is empty, allowed at least one character')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise DataError(f'{place}: "prompt" is not Unicode text ({error.reason})') from error
    return prompt


def tokenize_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[list[int]]:
    """Token ids of each prompt, begun as the tokenizer begins a text.

    Args:
        prompts: Texts.
        tokenizer: The model's own.
        max_length: Most tokens of a prompt, at least 1.

    Raises:
        DataError: A prompt, named by its number from 1 on, has no token, or too many.
    """
    tokens = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    for number, ids in enumerate(tokens, start=1):
        if not 1 <= len(ids) <= max_length:
            raise DataError(
                f"prompt {number}: got {len(ids)} tokens, allowed 1 to {max_length}, so that at least one new token"
                " fits the model's context"
            )
    return tokens
