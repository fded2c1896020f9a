"""Heads that do more than multiply: their logits are not hidden @ weight.T, as loss and decoding here take them."""

from __future__ import annotations

from transformers import PreTrainedConfig

from app.errors import ConfigError

# Settings of configurations that a model's forward applies at its head, of all causal LMs in transformers 5.23, and the
# values with which they do nothing. A test compares this table with transformers' source.
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


def check_plain_head(config: PreTrainedConfig, *, field: str) -> None:
    """Raise ConfigError, naming the setting, if the architecture changes its logits after (or right before) the head.

    Args:
        config: Of a causal LM.
        field: The setting that the model comes from.
    """
    text = config.get_text_config()
    active = [
        f"{name} {getattr(text, name)}"
        for name, neutral in _POST_PROCESSING.items()
        if getattr(text, name, None) not in neutral
    ]
    if active:
        got = f"{config.model_type} with {', '.join(active)}"
        raise ConfigError(field, got=got, allowed="a model whose logits are those of a plain linear LM head")
