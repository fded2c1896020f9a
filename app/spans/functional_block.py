"""Runs a decoder block as a function of its weights, in a few large products instead of many modules.

Shape legend: `B` sequences, `T` new positions, `S` stored positions, `D` width, `H` heads, `K` head width.
Tested by tests/unit/spans/test_decoder.py and test_architectures.py against the Hugging Face layers.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from app.model.cpu.norms import RMSNorm
from app.model.cpu.products import Product, in_fastest_layout
from app.model.quantized import Quantization
from app.spans.kv_cache import KeyValueCache

# Types whose layer is: x += attention(norm(x)); x += down(act(gate(norm(x))) * up(norm(x))). Biases, norms of queries
# and keys, and layers without rotation are optional.
FUNCTIONAL_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
FOLD_UP_TO = 32  # new positions; beyond, repeating the mask for each query head costs more than it saves


class Rotation(NamedTuple):
    """Rotary tables, each [1 or B, T, 1, K]: x * cos + roll(x, K/2) * signed_sin rotates x."""

    cos: Tensor
    signed_sin: Tensor


class Sight(NamedTuple):
    """What new positions see: the stored ones from `first` on, with `mask` added to the scores.

    The mask [1 or B, 1, T, S - first] is repeated along T for each query head of a group where T <= FOLD_UP_TO. It is
    None where one position sees all, or where more than FOLD_UP_TO begin at position 0.
    """

    first: int
    mask: Tensor | None


class FunctionalBlock:
    """A view on the weights of a layer that `is_functional`; it is valid while the parameters keep their memory."""

    def __init__(
        self, layer: Any, config: PretrainedConfig, *, layer_idx: int, quantization: Quantization = "none"
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._layer_idx = layer_idx
        self._head_width = attention.head_dim
        self._num_queries, self._num_keys = config.num_attention_heads, config.num_key_value_heads
        self._scaling = attention.scaling
        self._rotates = bool(getattr(attention, "use_rope", True))
        epsilon = config.rms_norm_eps
        self._attention_norm = RMSNorm(layer.input_layernorm.weight, epsilon)
        self._mlp_norm = RMSNorm(layer.post_attention_layernorm.weight, epsilon)
        self._query_norm = RMSNorm(attention.q_norm.weight, epsilon) if hasattr(attention, "q_norm") else None
        self._key_norm = RMSNorm(attention.k_norm.weight, epsilon) if hasattr(attention, "k_norm") else None
        self._qkv = Projections(attention.q_proj, attention.k_proj, attention.v_proj, quantization=quantization)
        self._output = Product(attention.o_proj.weight, attention.o_proj.bias, quantization)
        self._gate_up = Projections(mlp.gate_proj, mlp.up_proj, quantization=quantization)
        self._down = Product(mlp.down_proj.weight, mlp.down_proj.bias, quantization)
        self._activation: Callable[[Tensor], Tensor] = F.silu if config.hidden_act == "silu" else mlp.act_fn

    def __call__(self, hidden_BTD: Tensor, *, rotation: Rotation, sight: Sight, cache: KeyValueCache) -> Tensor:
        """Run the block on T new positions [B, T, D] and append their keys and values to the cache."""
        hidden_BTD = self._attend(self._attention_norm(hidden_BTD), rotation, sight, cache).add_(hidden_BTD)
        gate, up = self._gate_up(self._mlp_norm(hidden_BTD)).chunk(2, dim=-1)
        return self._down(self._activation(gate) * up).add_(hidden_BTD)

    def _attend(self, normed_BTD: Tensor, rotation: Rotation, sight: Sight, cache: KeyValueCache) -> Tensor:
        batch, num_new, _ = normed_BTD.shape
        rotated, value_BTHK = self._queries_and_keys(normed_BTD)
        if self._rotates:
            rolled = rotated.roll(self._head_width // 2, -1)
            rotated = torch.addcmul(rotated * rotation.cos, rolled, rotation.signed_sin)
        query_BTHK, key_BTHK = _split(rotated, self._num_queries, self._num_keys)
        keys_BHSK, values_BHSK = cache.append(key_BTHK, value_BTHK, self._layer_idx)
        first, mask = sight
        if first:
            keys_BHSK, values_BHSK = keys_BHSK[:, :, first:], values_BHSK[:, :, first:]
        if num_new > FOLD_UP_TO:
            groups = self._num_queries // self._num_keys
            if groups > 1 and needs_repeated_keys(query_BTHK, mask):
                keys_BHSK, values_BHSK = (x.repeat_interleave(groups, dim=1) for x in (keys_BHSK, values_BHSK))
            mixed_BHTK = F.scaled_dot_product_attention(
                query_BTHK.transpose(1, 2),
                keys_BHSK,
                values_BHSK,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self._scaling,
                enable_gqa=keys_BHSK.shape[1] < self._num_queries,
            )
            mixed = mixed_BHTK.transpose(1, 2)
        else:
            # Query heads of a group become further query positions of their one key head, so no key is repeated.
            query = query_BTHK.view(batch, num_new, self._num_keys, -1, self._head_width)
            folded = query[:, 0] if num_new == 1 else query.permute(0, 2, 3, 1, 4).flatten(2, 3)
            mixed = F.scaled_dot_product_attention(folded, keys_BHSK, values_BHSK, attn_mask=mask, scale=self._scaling)
            if num_new > 1:
                mixed = mixed.view(batch, self._num_keys, -1, num_new, self._head_width).permute(0, 3, 1, 2, 4)
        return self._output(mixed.reshape(batch, num_new, -1))

    def _queries_and_keys(self, normed_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys side by side [B, T, queries + keys, K], not yet rotated, and values [B, T, keys, K]."""
        parts = self._qkv(normed_BTD)
        heads_BTHK = parts.view(*parts.shape[:2], -1, self._head_width)
        rotated, value_BTHK = _split(heads_BTHK, self._num_queries + self._num_keys, self._num_keys)
        if self._query_norm is not None and self._key_norm is not None:
            query_BTHK, key_BTHK = _split(rotated, self._num_queries, self._num_keys)
            rotated = torch.cat((self._query_norm(query_BTHK), self._key_norm(key_BTHK)), dim=2)
        return rotated, value_BTHK


def needs_repeated_keys(query: Tensor, mask: Tensor | None) -> bool:
    """Whether SDPA would store all scores for query heads that share a key head.

    On a GPU only its flash kernel takes shared keys, and that kernel has neither masks nor float32.
    """
    return query.device.type != "cpu" and (mask is not None or query.dtype == torch.float32)


def _split(heads_BTHK: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    left, right = heads_BTHK.split_with_sizes([first, second], dim=2)
    return left, right


class Projections:
    """Linear layers of one input, which are one product where `join_projections` has joined their weights."""

    def __init__(self, *layers: nn.Linear, quantization: Quantization) -> None:
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        weight = _side_by_side(weights)
        bias = None if biases[0] is None else _side_by_side(biases)
        joined = weight is not None and (biases[0] is None or bias is not None)
        parts = [(weight, bias)] if joined and weight is not None else zip(weights, biases, strict=True)
        self._products = [Product(*part, quantization) for part in parts]

    def __call__(self, inputs: Tensor) -> Tensor:
        """The outputs of all layers in one tensor [..., sum of sizes]."""
        outputs = [product(inputs) for product in self._products]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view over tensors that follow one another in one storage, or None."""
    first = tensors[0]
    offset = first.storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and tensor.stride() == first.stride() and tensor.storage_offset() == offset):
            return None
        offset += tensor.shape[0] * tensor.stride(0)
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


@torch.no_grad()
def join_projections(model: PreTrainedModel, layers: Iterable[Any] | None = None) -> None:
    """Move query, key and value weights next to one another in memory, and gate and up, so each group is one product.

    The parameters and their names stay; at most one group exists twice at a time. Do it to a model you own and do not
    train, before decoding. `layers` are blocks of this model's kind, by default all of its own.
    """
    if not is_functional(model):
        return
    for layer in model.get_decoder().layers if layers is None else layers:
        attention, mlp = layer.self_attn, layer.mlp
        for group in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            for name in ("weight", "bias"):
                parameters = [getattr(linear, name) for linear in group]
                if parameters[0] is None:
                    continue
                joined = in_fastest_layout(torch.cat([parameter.data for parameter in parameters]))
                if not joined.is_contiguous():
                    for linear in group:
                        linear.register_state_dict_post_hook(_hand_out_contiguous)
                sizes = [parameter.shape[0] for parameter in parameters]
                for parameter, part in zip(parameters, joined.split_with_sizes(sizes), strict=True):
                    parameter.data = part


def _hand_out_contiguous(_: nn.Module, state_dict: dict[str, Any], prefix: str, __: Any) -> None:
    """Copy the weight of a `state_dict` that is laid out input by input, since safetensors saves no such tensor."""
    state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].contiguous()


def is_functional(model: PreTrainedModel) -> bool:
    """Whether FunctionalBlock can run every layer, which it cannot with wrapped projections (LoRA, quantised)."""
    if model.config.model_type not in FUNCTIONAL_MODEL_TYPES:
        return False
    return all(
        type(linear) is nn.Linear
        for layer in model.get_decoder().layers
        for module in (layer.self_attn, layer.mlp)
        for name, linear in module.named_children()
        if name.endswith("_proj")
    )
