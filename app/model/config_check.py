"""Checks from a configuration that its model can be built and run. Tested by tests/contract/test_command_line.py."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from app.config_tree import walk
from app.errors import ConfigError, check_range

_MOST_BLOCKS, _MOST = 10_000, 2**31 - 1
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
_NUMBERS = {  # at any depth of a configuration; models outside these ranges compute nothing of use
    "attention_dropout": (0.0, 1.0),
    "rms_norm_eps": (0.0, 0.1),
    "rope_theta": (1.0, 1e15),
    "factor": (1e-3, 1e6),  # by which rotary positions are scaled
}
_TABLES: Mapping[str, Any] = {"hidden_act": ACT2FN, "rope_type": {"default": None, **ROPE_INIT_FUNCTIONS}}

# Settings that a model's forward applies at its head, for all causal LMs in transformers 5.23, and the values with
# which they do nothing. A test compares this table with transformers' source.
_POST_PROCESSING: dict[str, tuple[float | None, ...]] = {
    "final_logit_softcapping": (None,),
    "logits_soft_cap": (None,),
    "output_logit_soft_cap": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "lm_head_multiplier": (None, 1.0),
    "logits_mup_width_multiplier": (None, 1.0),
    "unpadded_vocab_size": (None,),
}


def check_sizes(config: PreTrainedConfig) -> None:
    """Raise ConfigError for the first size, window or rate that no model can have."""
    check_range("num_hidden_layers", config.num_hidden_layers, low=1, high=_MOST_BLOCKS)
    for name in _SIZES:
        if isinstance(size := getattr(config, name, None), int):
            check_range(name, size, low=2 if name == "max_position_embeddings" else 1, high=_MOST)
    if (window := getattr(config, "sliding_window", None)) is not None:
        if type(window) is not int:
            raise ConfigError("sliding_window", got=window, allowed="an integer or null")
        check_range("sliding_window", window, low=1)
    for name, value in _settings(config):
        if name in _NUMBERS and isinstance(value, int | float):
            low, high = _NUMBERS[name]
            check_range(name, value, low=low, high=high)
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ConfigError("num_key_value_heads", got=groups, allowed=f"a divisor of num_attention_heads {heads}")


def check_plain_head(config: PreTrainedConfig, *, field: str) -> None:
    """Raise ConfigError if the logits are not hidden @ weight.T, as the loss and the decoder here compute them."""
    text = config.get_text_config()
    active = [
        f"{name} {getattr(text, name)}"
        for name, neutral in _POST_PROCESSING.items()
        if getattr(text, name, None) not in neutral
    ]
    if active:
        got = f"{config.model_type} with {', '.join(active)}"
        raise ConfigError(field, got=got, allowed="a model whose logits are those of a plain linear LM head")


@contextmanager
def refused_as_config(config: PreTrainedConfig) -> Iterator[None]:
    """Turn whatever transformers and torch raise while they build a model into a ConfigError.

    The error names the setting where a table of transformers lacks its value.
    """
    try:
        yield
    except Exception as error:  # constructors of any architecture raise anything
        if isinstance(error, KeyError):
            for name, value in _settings(config):
                if [value] == list(error.args):
                    allowed = " | ".join(_TABLES[name]) if name in _TABLES else "a name that transformers knows"
                    raise ConfigError(name, got=value, allowed=allowed) from error
        reason = str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"
        raise ConfigError("config", got=config.model_type, allowed="a model that can be built", fix=reason) from error


def build_without_memory(config: PreTrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """Build a causal LM on the meta device, or raise ConfigError."""
    with refused_as_config(config), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)


def check_runs(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without memory; ConfigError if it cannot be built or its shapes do not fit each other."""
    model = build_without_memory(config, dtype=torch.bfloat16).train()  # experts' products have only this dtype here
    tokens_BT = torch.zeros(1, 2, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device="meta")  # transformers would look at values to make one
    with refused_as_config(config), torch.no_grad():
        try:
            model(input_ids=tokens_BT, position_ids=tokens_BT, attention_mask=mask, use_cache=False)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise  # a forward that depends on values fails on the meta device, whatever its shapes
    return model


def _settings(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """Yield every setting by its own name, those within others too."""
    return ((path.rpartition(".")[2], value) for path, value in walk(config.to_dict(), into_lists=False))
