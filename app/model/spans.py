"""Run a Hugging Face decoder block by block: spans `start..stop` of its own layers on our cache.

Shape legend: `B` sequences, `T` new positions, `S` stored positions (new ones included), `D` width, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from app.errors import ConfigError, check_choice
from app.model.kv_cache import KeyValueCache
from app.protocols import DecoderCache

SlidingBlocks = Literal["none", "all", "by_layer_type"]

# model_type -> which blocks see only the last `config.sliding_window` positions, as the type's own forward decides.
# Each type's logits are tested against that forward. Types whose embedding or logits are scaled, capped or shifted
# outside the modules driven here (gemma, granite, cohere, ...) do not belong in this table.
SUPPORTED_MODEL_TYPES: dict[str, SlidingBlocks] = {
    "arcee": "none",
    "llama": "none",
    "mistral": "all",
    "olmo2": "none",
    "phi3": "all",
    "qwen2": "by_layer_type",
    "qwen3": "by_layer_type",
    "smollm3": "by_layer_type",
}
_FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # the others rewrite the model's buffers as text grows


class SpanDecoder:
    """A view on the live weights of a causal LM; implements protocols.ExitableDecoder.

    It changes neither weights, modes nor gradients. Run it in eval mode and under `torch.no_grad`.

    Args:
        model: A causal LM of a type in SUPPORTED_MODEL_TYPES with SDPA attention; its layers may be subclasses.

    Raises:
        ConfigError: The model cannot be driven in spans with its own logits as the result.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config, head = model.config, model.get_output_embeddings()
        check_choice("model_type", config.model_type, SUPPORTED_MODEL_TYPES)
        if not isinstance(head, nn.Linear):
            raise ConfigError("lm_head", got=type(head).__name__, allowed="a Linear whose output is the logits")
        if config._attn_implementation != "sdpa":
            raise ConfigError(
                "attn_implementation",
                got=config._attn_implementation,
                allowed="sdpa",
                fix='load the model with attn_implementation="sdpa"',
            )
        decoder: Any = model.get_decoder()
        if decoder.rotary_emb.rope_type not in _FIXED_ROPES:
            raise ConfigError("rope_type", got=decoder.rotary_emb.rope_type, allowed=" | ".join(_FIXED_ROPES))
        self._model, self._decoder, self._head = model, decoder, head
        self._layers = list(decoder.layers)  # slicing a ModuleList builds a new module: 50 us a call
        self._windows = _sliding_windows(config)
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None  # position ids, cos, sin from position 0 on

    @property
    def num_layers(self) -> int:
        """L, the number of blocks."""
        return len(self._windows)

    @property
    def max_length(self) -> int:
        """The context length: positions 0..max_length-1 exist."""
        return int(self._model.config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """V: token ids are 0..vocab_size-1."""
        return self._decoder.embed_tokens.num_embeddings  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where token ids must be."""
        return self._decoder.embed_tokens.weight.device  # type: ignore[no-any-return]

    def new_cache(self, capacity: int) -> KeyValueCache:
        """An empty cache with room for `capacity` positions (it may grow); asks for eval mode, once a decode."""
        if any(module.training for module in self._model.modules()):
            raise ConfigError("model", got="training mode", allowed="eval mode", fix="call model.eval() first")
        return KeyValueCache(num_layers=self.num_layers, capacity=capacity)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, D] that enter block 0."""
        return self._decoder.embed_tokens(tokens_BT)  # type: ignore[no-any-return]

    def run_blocks(self, hidden_BTD: Tensor, *, start: int, stop: int, cache: DecoderCache) -> Tensor:
        """Run blocks start..stop-1 on T new positions, which begin at `cache.length(start)`.

        Args:
            hidden_BTD: What enters block `start` [B, T, D].
            start: First block, 0..num_layers-1.
            stop: One past the last block, up to num_layers.
            cache: From `new_cache`; blocks start..stop-1 hold the same number of positions.

        Returns:
            Pre-norm hidden states [B, T, D].
        """
        num_new, first = hidden_BTD.shape[1], cache.length(start)
        positions_1T, rotary = self._positions(first, first + num_new, hidden_BTD)
        windows = self._windows[start:stop]
        masks = {
            window: attention_mask(first=first, num_new=num_new, window=window, device=hidden_BTD.device)
            for window in set(windows)
        }
        for layer, window in zip(self._layers[start:stop], windows, strict=True):
            out = layer(
                hidden_BTD,
                attention_mask=masks[window],
                position_embeddings=rotary,
                position_ids=positions_1T,
                past_key_values=cache,
                use_cache=True,
            )
            hidden_BTD = out[0] if isinstance(out, tuple) else out
        return hidden_BTD

    def _positions(self, first: int, stop: int, hidden_BTD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Position ids [1, T] and rotary tables (cos, sin) [1, T, head width] of positions first..stop-1.

        Cut from tables made once: computing them anew would cost a short draft a fifth of its time.
        """
        if self._tables is None or self._tables[0].shape[1] < stop or self._tables[1].dtype != hidden_BTD.dtype:
            positions_1P = torch.arange(max(stop, min(self.max_length, 2 * stop)), device=hidden_BTD.device)[None]
            self._tables = (positions_1P, *self._decoder.rotary_emb(hidden_BTD, positions_1P))
        positions_1T, cos, sin = (table[:, first:stop] for table in self._tables)
        return positions_1T, (cos, sin)

    def unembed(self, hidden_BTD: Tensor) -> Tensor:
        """Final norm and LM head: pre-norm hidden states [B, T, D] -> logits [B, T, V]."""
        return self._head(self._decoder.norm(hidden_BTD))  # type: ignore[no-any-return]


def _sliding_windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window of each block in positions, None where a block sees everything."""
    match SUPPORTED_MODEL_TYPES[config.model_type]:
        case "none":
            return [None] * config.num_hidden_layers
        case "all":
            return [config.sliding_window] * config.num_hidden_layers
        case "by_layer_type":
            return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


def attention_mask(*, first: int, num_new: int, window: int | None, device: torch.device) -> Tensor | None:
    """What `num_new` positions from `first` on may see, or None where SDPA's own rule says just that.

    A position i sees every j <= i, and with a window w only j > i - w. Without a mask SDPA lets one query see
    everything and treats several as causal from position 0, so those two cases need none.

    Returns:
        A boolean mask [1, 1, T, S], True where seen, or None.
    """
    num_stored = first + num_new
    fits_window = window is None or num_stored <= window
    if fits_window and (num_new == 1 or first == 0):
        return None
    query_T1 = torch.arange(first, num_stored, device=device)[:, None]
    key_S = torch.arange(num_stored, device=device)
    seen_TS = key_S <= query_T1
    if window is not None:
        seen_TS &= key_S > query_T1 - window
    return seen_TS[None, None]
