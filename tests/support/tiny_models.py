"""Small random models; nothing is downloaded."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def tiny_config(
    *,
    num_layers: int = 4,
    hidden_size: int = 32,
    vocab_size: int = 61,
    tied: bool = True,
    max_length: int = 512,
    **overrides: object,
) -> LlamaConfig:
    settings: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return LlamaConfig(**(settings | overrides))


def tiny_llama(*, seed: int = 0, init_scale: float = 5.0, **config: object) -> LlamaForCausalLM:
    """A random Llama in eval mode; `init_scale` spreads its logits so that argmax ties do not happen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(**config))  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(init_scale)
    return model.eval()


def settling_llama(later_blocks: float) -> LlamaForCausalLM:
    """Of four blocks, whose later ones add so much less that exits agree at some positions and not at others."""
    model = tiny_llama(seed=1, tied=False)
    scale_later_blocks(model, later_blocks)
    return model


@torch.no_grad()
def scale_later_blocks(model: PreTrainedModel, factor: float) -> None:
    """Scale what every block but the first adds."""
    for layer in model.model.layers[1:]:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)
