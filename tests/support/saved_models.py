"""Models saved by the test, as a user has them on disk."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tests.support.tiny_models import tiny_llama
from tests.support.tokenizers import byte_level

MAX_LENGTH = 96


def save_model(
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template: str | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """A tiny random Llama and its tokenizer as a Hugging Face directory."""
    tokenizer = tokenizer or byte_level()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    config: dict[str, Any] = {"vocab_size": len(tokenizer), "max_length": MAX_LENGTH, "tied": False}
    tiny_llama(**(config | settings)).to(dtype).save_pretrained(directory)
    return directory


def write_prompts(path: Path, prompts: Iterable[str]) -> Path:
    """A JSON lines file of prompts."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path
