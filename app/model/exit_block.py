"""Exit blocks: ordinary blocks and a norm of an exit's own, between block E - 1 and the shared head.

The blocks, norm and head of the model itself stay as they are, so that a finished model learns to stop early without
being touched (method card, "Exit blocks"). What an exit block drafts is what an ordinary model of E + A blocks would.

Shape legend: `B` sequences, `T` tokens, `D` model width.
"""

import copy
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from app.errors import ConfigError, check_early_exit, check_range

ExitBlockStart = Literal["exit", "last", "affine"]
_BY_LAYER = ("layer_types", "no_rope_layers")  # settings of a configuration that have an entry for each block
_LINEAR = ".decoder.norm.linear."  # in the names of weights of an exit block with an affine map


class AffineNorm(nn.Module):
    """A norm behind an affine map of its own, which begins as the identity: states [.., D] -> normed states [.., D]."""

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__()
        like = next(norm.parameters())
        self.linear = nn.Linear(width, width, device="meta").to_empty(device=like.device).to(like.dtype)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.linear(hidden))
        return normed


class ExitBlock(nn.Module):
    """A blocks and a norm that turn the state leaving block E - 1 into one that the shared head reads.

    z = head(g_x(B_A(..B_1(h_E)))), of which this module is all but the head. Each block begins as a copy of one of the
    model's blocks, and the norm as a copy of the final norm.

    Args:
        model: The model, whose blocks are still of their own classes.
        exit_layer: E, the blocks of the model that run before these, 1..num_layers - 1.
        source_layers: The index of the block that each of the A blocks begins as; none gives a norm alone.
        affine: Whether an affine map stands before the norm. Then the blocks add nothing at first (what their last
            products give is zero), so that the whole begins as that map.

    Raises:
        ConfigError: A number is out of its range.
    """

    def __init__(
        self, model: PreTrainedModel, *, exit_layer: int, source_layers: Sequence[int], affine: bool = False
    ) -> None:
        super().__init__()
        decoder: Any = model.get_decoder()
        num_layers = len(decoder.layers)
        check_early_exit("exit_layer", exit_layer, num_layers=num_layers)
        for layer in source_layers:
            check_range("source_layers", layer, low=0, high=num_layers - 1)
        self.exit_layer, self.source_layers = exit_layer, tuple(source_layers)
        config = config_of_blocks(decoder.config, source_layers)
        with torch.device("meta"):
            self.decoder: Any = type(decoder)(config)
        self.decoder.embed_tokens = None  # states enter it, never tokens
        self.decoder.layers = nn.ModuleList(copy.deepcopy(decoder.layers[layer]) for layer in source_layers)
        self.decoder.norm, self.decoder.rotary_emb = copy.deepcopy(decoder.norm), copy.deepcopy(decoder.rotary_emb)
        if affine:
            self.decoder.norm = AffineNorm(self.decoder.norm, config.hidden_size)
            for layer in self.decoder.layers:
                _begin_as_identity(layer)

    @property
    def size(self) -> int:
        norm = self.decoder.norm
        parts = [*self.decoder.layers, *([norm.linear] if isinstance(norm, AffineNorm) else [])]
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    @torch.no_grad()
    def begin_as(self, weight_DD: Tensor, bias_D: Tensor) -> None:
        """Let the normed states begin as W h + b of the state h leaving block E - 1, up to a factor for each state.

        The block must have an affine map. The factor is that of the norm, which gives a state the usual size.
        """
        found = self.decoder.norm
        assert isinstance(found, AffineNorm)
        gain_D: Tensor = found.norm(torch.ones_like(found.linear.bias)).to(weight_DD)
        per_gain_D = (1 / gain_D).where(gain_D != 0, 0.0)  # the norm multiplies by it again
        found.linear.weight.copy_(weight_DD * per_gain_D[:, None])
        found.linear.bias.copy_(bias_D * per_gain_D)

    def forward(self, hidden_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        """States leaving block E - 1 -> normed states [B, T, D] for the head; position ids restart at each document."""
        out = self.decoder(inputs_embeds=hidden_BTD, position_ids=position_ids_BT, attention_mask=None, use_cache=False)
        normed_BTD: Tensor = out.last_hidden_state
        return normed_BTD


def config_of_blocks(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """The configuration of a model that is made of these blocks of another, in this order."""
    own = copy.deepcopy(config)
    own.num_hidden_layers = len(layers)
    for name in _BY_LAYER:
        if (by_layer := getattr(own, name, None)) is not None:
            setattr(own, name, [by_layer[layer] for layer in layers])
    return own


def source_layers(num_layers: int, *, exit_layer: int, num_blocks: int, start: ExitBlockStart) -> list[int]:
    """Which of the model's blocks the A = `num_blocks` blocks of exit E begin as.

    `exit` and `affine` copy blocks E .. E + A - 1, which would run next; `last` copies the last A blocks.
    """
    check_early_exit("exit_layer", exit_layer, num_layers=num_layers)
    check_range("num_blocks", num_blocks, low=0, high=num_layers - exit_layer)
    first = num_layers - num_blocks if start == "last" else exit_layer
    return list(range(first, first + num_blocks))


def affine_exits(names: Iterable[str]) -> set[int]:
    """The exits that have an affine map, given the names of the weights of `exit_blocks_of`."""
    return {int(name.partition(".")[0]) for name in names if _LINEAR in name}


def exit_blocks_of(
    model: PreTrainedModel, sources: Mapping[int, Sequence[int]], *, affine: Container[int] = ()
) -> nn.ModuleDict:
    """The exit blocks of a model by exit layer (a string), given each one's source layers; `affine` ones have a map."""
    if not sources:
        raise ConfigError("exit_blocks", got={}, allowed="at least one exit")
    return nn.ModuleDict(
        {
            str(exit_layer): ExitBlock(model, exit_layer=exit_layer, source_layers=layers, affine=exit_layer in affine)
            for exit_layer, layers in sorted(sources.items())
        }
    )


def _begin_as_identity(layer: Any) -> None:
    """Set to zero what a block adds to its state; ConfigError for a block that is not made like a Llama's."""
    try:
        outputs = (layer.self_attn.o_proj, layer.mlp.down_proj)
    except AttributeError as error:
        allowed = "exit or last for this architecture, whose blocks have other parts than a Llama's"
        raise ConfigError("exit_blocks.start", got="affine", allowed=allowed, fix=str(error)) from error
    for output in outputs:
        for parameter in output.parameters():
            nn.init.zeros_(parameter)
