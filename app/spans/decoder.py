"""Runs a Hugging Face decoder block by block: spans `start..stop` of its layers on our cache.

Shape legend: `B` sequences, `T` new positions, `S` stored positions (new ones included), `D` width, `V` vocabulary.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from app.errors import ConfigError, check_choice, check_range
from app.model.cpu.products import Product
from app.model.exit_block import AffineNorm, ExitBlock
from app.model.quantized import Quantization
from app.protocols import DecoderCache
from app.spans.attention_masks import attention_mask, causal_mask, needs_no_mask, position_mask
from app.spans.functional_block import FOLD_UP_TO, FunctionalBlock, Rotation, Sight, is_functional
from app.spans.kv_cache import KeyValueCache
from app.spans.rotary_tables import RotaryTables, Tables
from app.spans.static_cache import StaticCache

SlidingBlocks = Literal["none", "all", "by_layer_type"]

# model_type -> the blocks that see only the last `config.sliding_window` positions, as the type's own forward decides.
# Tests compare the logits of each type with that forward. Types that scale, cap or shift embedding or logits outside
# the modules that run here (gemma, granite, cohere, ...) do not belong in this table.
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
_PIECE = 512  # new positions at a time where a mask is needed, which for a whole prompt would be prompt x prompt
_FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # the others rewrite the model's buffers as a text grows


class SpanDecoder:
    """A view on the live weights of a causal LM that implements protocols.ExitableDecoder.

    It changes neither weights, modes nor gradients. Run it in eval mode and under `torch.no_grad`. The layers of most
    types run as functions of their weights (`functional_block`), the others as modules; so do all if `functional` is
    False, to which tests compare. A `quantization` is of these functions and of the heads, those of exits and drafts
    among them, whose weights are such already. A model that would not give its own logits in spans is a ConfigError.

    Blocks of exits are numbered from `num_layers` on, in the order of the exits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        exit_blocks: Mapping[int, ExitBlock] | None = None,
        functional: bool = True,
        quantization: Quantization = "none",
    ) -> None:
        config, head = model.config, model.get_output_embeddings()
        check_choice("model_type", config.model_type, SUPPORTED_MODEL_TYPES)
        if not isinstance(head, nn.Linear):
            raise ConfigError("lm_head", got=type(head).__name__, allowed="a Linear whose output is the logits")
        if (attention := config._attn_implementation) != "sdpa":
            fix = 'load the model with attn_implementation="sdpa"'
            raise ConfigError("attn_implementation", got=attention, allowed="sdpa", fix=fix)
        decoder: Any = model.get_decoder()
        if decoder.rotary_emb.rope_type not in _FIXED_ROPES:
            raise ConfigError("rope_type", got=decoder.rotary_emb.rope_type, allowed=" | ".join(_FIXED_ROPES))
        self._model, self._decoder = model, decoder
        self.quantization, self._head = quantization, Product(head.weight, head.bias, quantization)
        self._layers = list(decoder.layers)  # slicing a ModuleList builds a new module: 50 us a call
        self._windows = _sliding_windows(config)
        self._norms, self._exit_spans = {self.num_layers: decoder.norm}, dict[int, range]()
        self._exit_blocks = dict(sorted((exit_blocks or {}).items()))
        for exit_layer, block in self._exit_blocks.items():
            for layer, source in zip(block.decoder.layers, block.source_layers, strict=True):
                layer.self_attn.layer_idx = len(self._layers)  # where modules keep their keys and values
                self._layers.append(layer)
                self._windows.append(self._windows[source])
            self._exit_spans[exit_layer] = range(len(self._layers) - len(block.source_layers), len(self._layers))
            self._norms[exit_layer] = block.decoder.norm
        self._blocks: list[FunctionalBlock] = []
        if functional and is_functional(model):
            self._blocks = [
                FunctionalBlock(layer, config, layer_idx=i, quantization=quantization)
                for i, layer in enumerate(self._layers)
            ]
        self._query_groups = config.num_attention_heads // config.num_key_value_heads
        self._tables = RotaryTables(decoder.rotary_emb, max_length=self.max_length)
        self.use_draft_vocabulary(None)

    @property
    def num_layers(self) -> int:
        """L, the number of blocks."""
        return len(self._decoder.layers)

    def exit_span(self, exit_layer: int) -> range:
        """The blocks that this exit has of its own, as `run_blocks` numbers them; empty where it has none."""
        return self._exit_spans.get(exit_layer, range(0))

    def exit_block_size(self, exit_layer: int) -> int:
        """Parameters of the blocks and the affine map that this exit has of its own; 0 where it has none."""
        return self._exit_blocks[exit_layer].size if exit_layer in self._exit_blocks else 0

    @property
    def own_exits(self) -> tuple[int, ...]:
        """The exits that have blocks or a norm of their own, ascending."""
        return tuple(self._exit_blocks)

    @property
    def exit_blocks(self) -> Mapping[int, ExitBlock]:
        """What each of these exits has of its own, by exit layer."""
        return self._exit_blocks

    @property
    def max_length(self) -> int:
        """The context length in tokens."""
        return int(self._model.config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        return self._decoder.embed_tokens.num_embeddings  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """The device on which token ids must be."""
        return self._decoder.embed_tokens.weight.device  # type: ignore[no-any-return]

    @property
    def block_size(self) -> int:
        """Parameters of one block."""
        return sum(parameter.numel() for parameter in self._layers[0].parameters())

    @property
    def head_size(self) -> int:
        """Parameters of the LM head."""
        return self._head.weight.numel()

    @property
    def draft_head_size(self) -> int:
        """Parameters of the rows of the LM head that drafts use."""
        return self._draft_head.weight.numel()

    @property
    def draft_vocabulary(self) -> tuple[int, ...] | None:
        """The token ids that drafts are chosen from, in the order given; None where these are all."""
        return self._draft_vocabulary

    @property
    def draft_ids(self) -> Tensor | None:
        """The same ids [V'] in ascending order, on `device`."""
        return self._draft_ids

    def use_draft_vocabulary(self, token_ids: Sequence[int] | None) -> None:
        """Let drafts use only these rows of the head, which are copied once; None gives them the whole head back.

        Raises:
            ConfigError: An id is not in the vocabulary, or stands twice.
        """
        self._draft_vocabulary: tuple[int, ...] | None = None
        self._draft_ids: Tensor | None = None
        self._draft_head = self._head.often_read()
        self.kept_program: Any = None
        if token_ids is None:
            return
        if not token_ids or len(set(token_ids)) < len(token_ids):
            raise ConfigError(
                "draft_vocabulary", got=f"{len(token_ids)} ids", allowed="different token ids, at least one"
            )
        for token in (min(token_ids), max(token_ids)):
            check_range("draft_vocabulary", token, low=0, high=self.vocab_size - 1, fix="use the model's own tokenizer")
        self._draft_vocabulary = tuple(token_ids)
        # Of equal logits the lowest id counts, as in the whole vocabulary.
        ids = self._draft_ids = torch.tensor(sorted(token_ids), device=self.device)
        bias = None if self._head.bias is None else self._head.bias.detach()[ids]
        self._draft_head = Product(self._head.weight.detach()[ids], bias, self.quantization).often_read()

    def new_cache(self, *, batch_size: int = 1, capacity: int) -> KeyValueCache:
        """An empty cache of `capacity` positions a sequence, which may grow; ConfigError in training mode."""
        self._check_mode()
        return KeyValueCache(num_layers=len(self._layers), batch_size=batch_size, capacity=capacity)

    def new_static_cache(self, *, batch_size: int, capacity: int) -> StaticCache:
        """The same of fixed size for rounds that are fixed sequences of kernels, with its lengths on the device."""
        self._check_mode()
        return StaticCache(num_layers=len(self._layers), batch_size=batch_size, capacity=capacity, device=self.device)

    def _check_mode(self) -> None:
        if any(module.training for part in (self._model, *self._exit_blocks.values()) for module in part.modules()):
            raise ConfigError("model", got="training mode", allowed="eval mode", fix="call model.eval() first")

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, D] that enter block 0."""
        return F.embedding(tokens_BT, self._decoder.embed_tokens.weight)

    def run_blocks(self, hidden_BTD: Tensor, *, start: int, stop: int, cache: DecoderCache) -> Tensor:
        """Run blocks start..stop-1 on T new positions of each sequence, which begin at `cache.lengths(start)`.

        The hidden states [B, T, D] that enter block `start` become the pre-norm ones that leave block `stop - 1`. In
        the cache, from `new_cache`, all these blocks hold the same numbers of positions.
        """
        assert isinstance(cache, KeyValueCache)
        num_new, starts = hidden_BTD.shape[1], cache.lengths(start)
        windows = self._windows[start:stop]
        capacity = cache.masked_capacity
        whole = capacity is None and all(needs_no_mask(starts, num_new, window) for window in windows)
        if num_new > _PIECE and not whole:
            return self._run_in_pieces(hidden_BTD, start, stop, cache=cache)
        tables = self._tables.next(cache, start, num_new, like=hidden_BTD)
        sights = {
            window: self._sight(starts, tables.positions, window, like=hidden_BTD)
            if capacity is None
            else self._folded(0, position_mask(tables.positions, range(capacity), window, like=hidden_BTD))
            for window in set(windows)
        }
        if not self._blocks:
            return self._run_modules(hidden_BTD, start, stop, cache=cache, sights=sights, tables=tables)
        rotation = Rotation(tables.cos[:, :, None], tables.signed_sin[:, :, None])
        for block, window in zip(self._blocks[start:stop], windows, strict=True):
            hidden_BTD = block(hidden_BTD, rotation=rotation, sight=sights[window], cache=cache)
        return hidden_BTD

    def _run_in_pieces(self, hidden_BTD: Tensor, start: int, stop: int, *, cache: KeyValueCache) -> Tensor:
        """Give the positions piece by piece to blocks that need a mask, and all at once to the blocks between them."""
        starts, num_new = cache.lengths(start), hidden_BTD.shape[1]
        for window, run in groupby(range(start, stop), self._windows.__getitem__):
            blocks = list(run)
            size = num_new if needs_no_mask(starts, num_new, window) else _PIECE
            pieces = [
                self.run_blocks(piece, start=blocks[0], stop=blocks[-1] + 1, cache=cache)
                for piece in torch.split(hidden_BTD, size, dim=1)
            ]
            hidden_BTD = torch.cat(pieces, dim=1)
        return hidden_BTD

    def _run_modules(
        self,
        hidden_BTD: Tensor,
        start: int,
        stop: int,
        *,
        cache: KeyValueCache,
        sights: dict[int | None, Sight],
        tables: Tables,
    ) -> Tensor:
        for layer, window in zip(self._layers[start:stop], self._windows[start:stop], strict=True):
            # The fourth argument is named `past_key_values` up to transformers 5.23, and `cache` from 5.24 on.
            given = hidden_BTD, sights[window].mask, tables.positions, cache
            out = layer(*given, use_cache=True, position_embeddings=(tables.cos, tables.sin))
            hidden_BTD = out[0] if isinstance(out, tuple) else out
        return hidden_BTD

    def _sight(self, starts: Sequence[int], queries_BT: Tensor, window: int | None, *, like: Tensor) -> Sight:
        num_new = queries_BT.shape[1]
        # The layers' own forwards always look at all stored positions.
        first = 0 if window is None or not self._blocks else max(0, min(starts) + 1 - window)
        mask = attention_mask(starts, queries_BT=queries_BT, window=window, first=first, like=like)
        # SDPA's causal rule is wrong for query heads folded into positions.
        if mask is None and self._blocks and 1 < num_new <= FOLD_UP_TO:
            mask = causal_mask(num_new, num_new, like=like)
        return self._folded(first, mask)

    def _folded(self, first: int, mask: Tensor | None) -> Sight:
        """The mask [1 or B, 1, T, S - first], repeated for query heads where FunctionalBlock folds them."""
        if mask is not None and self._blocks and self._query_groups > 1 and mask.shape[-2] <= FOLD_UP_TO:
            mask = mask.repeat(1, 1, self._query_groups, 1)
        return Sight(first, mask)

    def unembed(self, hidden_BTD: Tensor, *, exit_layer: int | None = None) -> Tensor:
        """Norm of an exit, by default the final one, and LM head: pre-norm states [B, T, D] -> logits [B, T, V]."""
        return self._head(self._normed(hidden_BTD, exit_layer))

    def draft_logits(self, hidden_BTD: Tensor, *, exit_layer: int) -> Tensor:
        """The same for drafts, with logits [B, T, V'] of `draft_ids` alone where these are not all."""
        return self._draft_head(self._normed(hidden_BTD, exit_layer))

    def _normed(self, hidden_BTD: Tensor, exit_layer: int | None) -> Tensor:
        norm = self._norms.get(exit_layer or self.num_layers, self._decoder.norm)
        if isinstance(norm, AffineNorm):
            hidden_BTD, norm = norm.linear(hidden_BTD), norm.norm
        if self._blocks:  # these types end in a plain RMSNorm, whose module takes three times as long
            return F.rms_norm(hidden_BTD, hidden_BTD.shape[-1:], norm.weight, norm.variance_epsilon)
        return norm(hidden_BTD)  # type: ignore[no-any-return]


def _sliding_windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window of each block in positions, None where a block sees everything."""
    match SUPPORTED_MODEL_TYPES[config.model_type]:
        case "none":
            return [None] * config.num_hidden_layers
        case "all":
            return [config.sliding_window] * config.num_hidden_layers
        case "by_layer_type":
            return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
