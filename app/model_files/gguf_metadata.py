"""Obeys what a GGUF file states and transformers passes over, or refuses it. Tested by test_gguf.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from app.errors import ConfigError

if TYPE_CHECKING:  # an optional dependency
    from gguf import GGUFReader

_ROPE_FACTORS = "rope_freqs.weight"  # llama.cpp divides the frequency of each pair of dimensions by it
_LLAMA3_LENGTHS = 8192, *(2**power for power in range(5, 21))  # before scaling; every published Llama 3 has the first
_SIZES = ("context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size")
_ATTENTION = ("head_count", "head_count_kv", "layer_norm_rms_epsilon", "key_length", "value_length")
_ROPE = ("freq_base", "dimension_count", "scale_linear")
_SCALING = ("type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow", "finetuned")
_OBEYED = {  # keys that are obeyed here or by transformers; `finetuned` and the layout only say how the file was made
    *(*_SIZES, "tensor_data_layout"),
    *(f"attention.{key}" for key in _ATTENTION),
    *(f"rope.{key}" for key in _ROPE),
    *(f"rope.scaling.{key}" for key in _SCALING),
}
_ATTRIBUTES = {  # keys and the attributes that mean the same, in configurations that have them
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_NEUTRAL = {  # values that change nothing; of any other key it is 0, such as no experts, no clamp, no bias
    "attention.causal": 1,
    "logit_scale": 1,
    "embedding_scale": 1,
    "residual_scale": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
}
_ALLOWED = "a .gguf file that states only what is supported here"
_Refuse = Callable[[str, str], ConfigError]


def obey_metadata(config: PreTrainedConfig, reader: GGUFReader, *, field: str, path: str) -> None:
    """Put into `config`, as transformers made it from the file, what the file states besides, in place.

    The keys are those of the GGUF specification, and the defaults are llama.cpp's. What no configuration of this
    architecture can say, or what is not known here, is a ConfigError that names `field` and `path`.
    """
    prefix = f"{reader.fields['general.architecture'].contents()}."
    stated = {name[len(prefix) :]: part.contents() for name, part in reader.fields.items() if name.startswith(prefix)}
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}

    def refuse(key: str, why: str) -> ConfigError:
        said = f"{prefix}{key} = {stated[key]}" if key in stated else f"tensor {key}"
        return ConfigError(field, got=path, allowed=_ALLOWED, fix=f"{said}: {why}")

    for key, value in stated.items():
        attribute = _ATTRIBUTES.get(key, key)
        if key in _ATTRIBUTES and hasattr(config, attribute) and not hasattr(config, f"use_{attribute}"):
            setattr(config, attribute, value)
        elif key not in _OBEYED and value != _NEUTRAL.get(key, 0):
            raise refuse(key, "this is not supported, and without it the model would compute something else")
    if "attention.sliding_window" not in stated and hasattr(config, "sliding_window"):
        config.sliding_window = None  # some classes of transformers have one by default
    config.num_key_value_heads = stated.get("attention.head_count_kv", config.num_attention_heads)
    for bias, weight in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_up")):
        if hasattr(config, bias):
            setattr(config, bias, f"blk.0.{weight}.bias" in tensors)
    _set_head(config, stated, refuse)
    _set_rope(config, stated, tensors, refuse)


def _set_head(config: PreTrainedConfig, stated: Mapping[str, Any], refuse: _Refuse) -> None:
    """Set the width of a head and the part of it that rotates, which transformers takes for the width."""
    usual = config.hidden_size // config.num_attention_heads
    head_dim = stated.get("attention.key_length", usual)
    if stated.get("attention.value_length", head_dim) != head_dim:
        raise refuse("attention.value_length", f"the keys of a head have {head_dim}, and both must be alike")
    if hasattr(config, "head_dim") or head_dim != usual:
        config.head_dim = head_dim
    rotated = stated.get("rope.dimension_count", head_dim)
    if config.model_type == "phi3":
        config.rope_parameters["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        why = f"a {config.model_type} of transformers rotates all {head_dim} dimensions of a head"
        raise refuse("rope.dimension_count", why)


def _set_rope(config: PreTrainedConfig, stated: Mapping[str, Any], tensors: Mapping[str, Any], refuse: _Refuse) -> None:
    config.rope_parameters.setdefault("rope_theta", 10_000.0)
    scaling = _stated_scaling(stated, refuse)
    if longrope := [name for name in tensors if name.startswith("rope_factors_")]:
        why = "rope scaling of type longrope, which changes with a text's length, is not known here"
        raise refuse(longrope[0], why)
    factors = tensors.get(_ROPE_FACTORS)
    if factors is not None and not np.allclose(factors, 1.0):
        found = None if scaling else _llama3(config, torch.tensor(factors))
        if found is None:
            raise refuse(_ROPE_FACTORS, "no rope scaling of type llama3 has these factors, and no other type is known")
        scaling = found
    if scaling:
        config.rope_parameters = {**config.rope_parameters, **scaling}
        try:
            config.validate_rope()
        except (ValueError, KeyError) as error:  # the class knows only some types
            raise refuse("rope.scaling.type", str(error)) from error


def _stated_scaling(stated: Mapping[str, Any], refuse: _Refuse) -> dict[str, Any]:
    """The scaling that the keys state, as `rope_parameters` has it; {} for none."""
    factor = stated.get("rope.scaling.factor", stated.get("rope.scale_linear", 0.0))
    kind = stated.get("rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {}
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    if kind != "yarn" or not factor or "rope.scaling.original_context_length" not in stated:
        why = "known are none, linear, and yarn with a factor and an original_context_length"
        raise refuse("rope.scaling.type", why)
    length = stated["rope.scaling.original_context_length"]
    betas = {name: stated[key] for name in ("beta_fast", "beta_slow") if (key := f"rope.scaling.yarn_{name}") in stated}
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": length, **betas}


def _llama3(config: PreTrainedConfig, factors: torch.Tensor) -> dict[str, Any] | None:
    """The parameters of rope type llama3 that give these factors [head_dim / 2], or None.

    The low and high frequency factors are 1 and 4, as in every published model. The slowest pair does not turn once in
    a text of the original length, so its factor is the scaling's. Lengths that give equal factors give equal models.
    """
    trial = copy.deepcopy(config)
    default = trial.rope_parameters["rope_theta"] ** (-torch.arange(len(factors)) / len(factors))
    for length in _LLAMA3_LENGTHS:
        scaling = {
            "rope_type": "llama3",
            "factor": round(float(factors.max()), 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": length,
        }
        trial.rope_parameters = {**config.rope_parameters, **scaling}
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](trial, None)
        if frequencies.shape == factors.shape and torch.allclose(default / frequencies, factors, rtol=1e-4):
            return scaling
    return None


def check_all_used(model: PreTrainedModel, reader: GGUFReader, *, field: str, path: str) -> None:
    """Raise ConfigError if the file has tensors that `model` has not, since transformers leaves them out silently."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    named = reader.fields["general.architecture"].contents()
    architecture = next(known for known, name in MODEL_ARCH_NAMES.items() if name == named)
    names = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    used = {names.get_name(weight, try_suffixes=(".weight", ".bias")) for weight in model.state_dict()}
    if unused := sorted({tensor.name for tensor in reader.tensors} - used - {_ROPE_FACTORS}):
        fix = f"{len(unused)} of its tensors are not in a {model.config.model_type} of transformers: {unused[0]}"
        raise ConfigError(field, got=path, allowed=_ALLOWED, fix=fix)
