"""A handful of tiny random models, each built once: kinds of layers, heads, ropes, windows, agreement of exits."""

from functools import cache
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from app.model.exit_block import ExitBlock
from app.spans.decoder import SpanDecoder
from app.spans.functional_block import join_projections
from tests.support.slow_twins import greedy_by_recomputation
from tests.support.tiny_models import scale_later_blocks

VOCAB = 61
CONTEXT = 512
LEAST_GAP = 1e-3  # of the best two logits, whose spread is about 10; nearer ones are left to rounding


class _Spec(NamedTuple):
    """How a model is built; seeds are such that its continuations vary."""

    kind: str
    num_layers: int
    later_blocks: float  # by how much less blocks after the first add, so that exits agree
    seed: int
    extra: dict[str, Any]


def _scaled_rope(rope_type: str, **settings: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **settings}}


_LLAMA3 = _scaled_rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
_QWEN2 = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
_QWEN3 = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "head_dim": 16}
_MODELS = {
    "llama of 2 layers": _Spec("llama", 2, 1.0, 3, {"num_key_value_heads": 4}),
    "llama whose exits agree": _Spec("llama", 3, 0.1, 3, {}),
    "llama whose exits disagree": _Spec("llama", 4, 1.0, 8, {"num_key_value_heads": 1}),
    "llama of 5 layers, joined": _Spec("llama", 5, 0.2, 3, _LLAMA3),
    "llama with tied weights": _Spec("llama", 3, 0.5, 6, {"tie_word_embeddings": True}),
    "llama by modules": _Spec("llama", 4, 0.2, 10, _scaled_rope("linear", factor=2.0)),
    "mistral with a window": _Spec("mistral", 3, 0.2, 2, {"sliding_window": 7}),
    "qwen2 with biases": _Spec(
        "qwen2", 3, 0.2, 7, _scaled_rope("yarn", factor=8.0, original_max_position_embeddings=64)
    ),
    "qwen2 with a window": _Spec("qwen2", 4, 0.2, 1, _QWEN2),
    "qwen3 with a window, joined": _Spec("qwen3", 4, 0.2, 1, _QWEN3),
    "smollm3 with unrotated layers": _Spec("smollm3", 3, 0.2, 3, {"no_rope_layer_interval": 2}),
    "olmo2 by modules": _Spec("olmo2", 3, 0.2, 1, {}),
    "phi3 with a window": _Spec("phi3", 3, 0.2, 6, {"sliding_window": 6}),
}
NAMES = tuple(_MODELS)


class LimitedDecoder(SpanDecoder):
    """A SpanDecoder whose context the test chooses."""

    limit = CONTEXT

    @property
    def max_length(self) -> int:
        return self.limit


def build(kind: str, *, num_layers: int, later_blocks: float = 1.0, seed: int = 1, **extra: Any) -> PreTrainedModel:
    """A random model in eval mode; weights are enlarged so that its choices vary."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(settings | extra)))
        for parameter in model.parameters():
            parameter.mul_(5.0) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
        if model.config.tie_word_embeddings:  # larger ones repeat one token for ever
            model.get_input_embeddings().weight.mul_(0.6)
        scale_later_blocks(model, later_blocks)
    return model.eval()


@cache
def model_named(name: str) -> PreTrainedModel:
    spec = _MODELS[name]
    model = build(spec.kind, num_layers=spec.num_layers, later_blocks=spec.later_blocks, seed=spec.seed, **spec.extra)
    if "joined" in name:
        join_projections(model)
    return model


@cache
def decoder_named(name: str) -> LimitedDecoder:
    return LimitedDecoder(model_named(name), functional="by modules" not in name)


@cache
def decoder_with_exit_blocks(name: str, *, perfect: bool = False) -> LimitedDecoder:
    """The same with blocks of its own at exit 1, and in larger models an affine map at exit 2 and two blocks at exit 3.

    They are copies of the last blocks, or at exit 1 of all later blocks if `perfect`, so that they draft what the model
    says.
    """
    model = model_named(name)
    num_layers = model.config.num_hidden_layers
    sources = {1: [*range(1 if perfect else num_layers - 1, num_layers)], 2: [], 3: [num_layers - 2, num_layers - 1]}
    blocks = {
        exit_layer: ExitBlock(model, exit_layer=exit_layer, source_layers=of, affine=not of)
        for exit_layer, of in sources.items()
        if exit_layer < num_layers
    }
    for block in blocks.values():
        block.eval()
    return LimitedDecoder(model, exit_blocks=blocks, functional="by modules" not in name)


@cache
def draft_decoder(num_layers: int, vocab_size: int) -> SpanDecoder:
    """A smaller model to draft with, of another width and seed."""
    extra = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": vocab_size}
    return SpanDecoder(build("llama", num_layers=num_layers, seed=2, **extra))


def prompt_of(length: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@cache
def continuation(name: str, prompt_length: int, num_tokens: int) -> list[int]:
    """Of the prompt of this length, as far as rounding cannot decide."""
    return greedy_by_recomputation(
        model_named(name), prompt_of(prompt_length), max_new_tokens=num_tokens, least_gap=LEAST_GAP
    )
