"""Checkpoints of ours, written without training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.model.tokenizer_files import tokenizer_to_files
from app.model.trained_weights import HF_CONFIG_KEY, STATE_DICT_PREFIX, TOKENIZER_KEY


def write_checkpoint(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **other: object) -> str:
    """What LayerSkipModule saves, as one file."""
    content = {
        HF_CONFIG_KEY: json.loads(model.config.to_json_string(use_diff=False)),
        TOKENIZER_KEY: tokenizer_to_files(tokenizer),
        "global_step": 3,
        "state_dict": {f"{STATE_DICT_PREFIX}{name}": tensor for name, tensor in model.state_dict().items()},
    }
    torch.save(content | other, path)
    return str(path)
