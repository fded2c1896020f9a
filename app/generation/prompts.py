"""Prompts: read from a file of JSON lines and turned into token ids; an error names the line or the prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import ConfigError, DataError, check_range, shortened
from app.text.text_tokens import prompt_tokens

if TYPE_CHECKING:  # a missing file is refused before transformers, which loads for seconds, is imported
    from transformers import PreTrainedTokenizerBase


def read_prompts(path: str, *, limit: int | None = None) -> list[str]:
    """Read a JSON lines file in UTF-8: each line holds one object with a string `prompt`, or is blank.

    Args:
        limit: Read at most this many prompts, at least 1, and nothing after them.

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
                    prompts.append(_prompt(line, location=f"{path}, line {number}"))
    except OSError as error:
        raise DataError(f"prompts: {path} cannot be read: {error.strerror}") from error
    if not prompts:
        raise DataError(f'prompts: {path} holds no prompt; write one object a line, {{"prompt": "..."}}')
    return prompts


def prompts_file(texts: Iterable[str]) -> str:
    """The content of a file that `read_prompts` reads."""
    return "".join(json.dumps({"prompt": text}) + "\n" for text in texts)


def given_texts(prompt: Sequence[str] | None, prompts: str | None, *, limit: int | None = None) -> list[str]:
    """Return each `prompt`, or those of the file `prompts`; ConfigError unless exactly one of the two is given."""
    if prompt is not None and prompts is not None:
        raise ConfigError("prompts", got=prompts, allowed="either prompt or prompts, not both")
    if prompts is not None:
        return read_prompts(prompts, limit=limit)
    if not prompt or not all(prompt):
        got = None if prompt is None else ""
        raise ConfigError("prompt", got=got, allowed="at least one character", fix="or prompts, a file of them")
    return [*prompt]


def _prompt(line: bytes, *, location: str) -> str:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{location}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise DataError(f'{location}: got {type(entry).__name__}, allowed an object with a string "prompt"')
    if "prompt" not in entry:
        raise DataError(f'{location}: no "prompt", only {sorted(entry)}')
    prompt = entry["prompt"]
    if not isinstance(prompt, str):
        raise DataError(f'{location}: "prompt" is {type(prompt).__name__}, allowed a string')
    if not prompt:
        raise DataError(f'{location}: "prompt" is empty, allowed at least one character')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise DataError(f'{location}: "prompt" is not Unicode text ({error.reason})') from error
    return prompt


def encode_prompts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat: bool = False,
    location: str = "prompt",
) -> list[list[int]]:
    """Token ids of each prompt, 1 to `max_length` - 1 of them, so that at least one new token fits.

    Args:
        max_length: Tokens of the model's context.
        chat: Put each text into the tokenizer's chat template, as the user's message.
        location: Names the prompts in an error; a number is added where there are several.

    Raises:
        ConfigError: A prompt is empty, too long or not Unicode, or no chat template takes it.
    """
    prompts = []
    for number, text in enumerate(texts, start=1):
        field = location if len(texts) == 1 else f"{location} {number}"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(field, got=text, allowed="Unicode text") from error
        message = {"role": "user", "content": text}
        ids = chat_tokens(tokenizer, [message]) if chat else prompt_tokens(tokenizer, text)
        check_length(field, ids, max_length=max_length)
        prompts.append(ids)
    return prompts


def check_length(field: str, ids: Sequence[int], *, max_length: int) -> None:
    """Raise ConfigError unless a prompt has 1 to `max_length` - 1 tokens."""
    if not 1 <= len(ids) < max_length:
        allowed = f"1 to {max_length - 1} tokens, so that a new one fits the model's context"
        raise ConfigError(field, got=f"{len(ids)} tokens", allowed=allowed)


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the assistant speaks next; each message has a `role` and a `content`.

    Raises:
        ConfigError: The tokenizer has no chat template, or it does not take these messages.
    """
    if tokenizer.chat_template is None:
        raise ConfigError("chat", got=True, allowed="false", fix="this tokenizer has no chat template")
    try:
        conversation = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program
        allowed = "a template that takes these messages"
        raise ConfigError("chat", got=True, allowed=allowed, fix=shortened(error)) from error
    # The template writes the beginning of the conversation, so the tokenizer must not add its own.
    return list(tokenizer(conversation, add_special_tokens=False)["input_ids"])
