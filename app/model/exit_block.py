"""Exit blocks: ordinary blocks and a norm of an exit's own, between block E - 1 and the shared head.

The blocks, norm and head of the model itself stay as they are, so that a finished model learns to stop early without
being touched (method card, "Exit blocks"). What an exit block drafts is what an ordinary model of E + A blocks would.

Shape legend: `B` sequences, `T` tokens, `D` model width.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.errors import ConfigError, check_early_exit, check_range

ExitBlockStart = Literal["exit", "last"]
BY_LAYER = ("layer_types", "no_rope_layers")  # settings of a configuration that have an entry for each block


class ExitBlock(nn.Module):
    """A blocks and a norm that turn the state leaving block E - 1 into one that the shared head reads.

    z = head(g_x(B_A(..B_1(h_E)))), of which this module is all but the head. Each block begins as a copy of one of the
    model's blocks, and the norm as a copy of the final norm.

    Args:
        model: The model, whose blocks are still of their own classes.
        exit_layer: E, the blocks of the model that run before these, 1..num_layers - 1.
        source_layers: The index of the block that each of the A blocks begins as; none gives a norm alone.

    Raises:
        ConfigError: A number is out of its range.
    """

    def __init__(self, model: PreTrainedModel, *, exit_layer: int, source_layers: Sequence[int]) -> None:
        super().__init__()
        decoder: Any = model.get_decoder()
        num_layers = len(decoder.layers)
        check_early_exit("exit_layer", exit_layer, num_layers=num_layers)
        for layer in source_layers:
            check_range("source_layers", layer, low=0, high=num_layers - 1)
        self.exit_layer, self.source_layers = exit_layer, tuple(source_layers)
        config = copy.deepcopy(decoder.config)
        config.num_hidden_layers = len(source_layers)
        for name in BY_LAYER:
            if (by_layer := getattr(config, name, None)) is not None:
                setattr(config, name, [by_layer[layer] for layer in source_layers])
        with torch.device("meta"):
            self.decoder: Any = type(decoder)(config)
        self.decoder.embed_tokens = None  # states enter it, never tokens
        self.decoder.layers = nn.ModuleList(copy.deepcopy(decoder.layers[layer]) for layer in source_layers)
        self.decoder.norm, self.decoder.rotary_emb = copy.deepcopy(decoder.norm), copy.deepcopy(decoder.rotary_emb)

    def forward(self, hidden_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        """States leaving block E - 1 -> normed states [B, T, D] for the head.

        Position ids restart at 0 with each document, and attention does not cross a restart.
        """
        out = self.decoder(inputs_embeds=hidden_BTD, position_ids=position_ids_BT, attention_mask=None, use_cache=False)
        normed_BTD: Tensor = out.last_hidden_state
        return normed_BTD


def source_layers(num_layers: int, *, exit_layer: int, num_blocks: int, start: ExitBlockStart) -> list[int]:
    """Which of the model's blocks the A blocks of an exit begin as.

    Args:
        num_layers: L.
        exit_layer: E, 1..L - 1.
        num_blocks: A, at least 0.
        start: `exit` copies blocks E .. E + A - 1, which would run next; `last` the last A blocks.
    """
    check_early_exit("exit_layer", exit_layer, num_layers=num_layers)
    check_range("num_blocks", num_blocks, low=0, high=num_layers - exit_layer)
    first = exit_layer if start == "exit" else num_layers - num_blocks
    return list(range(first, first + num_blocks))


def exit_blocks_of(model: PreTrainedModel, sources: Mapping[int, Sequence[int]]) -> nn.ModuleDict:
    """The exit blocks of a model by exit layer (as a string), given the source layers of each."""
    if not sources:
        raise ConfigError("exit_blocks", got={}, allowed="at least one exit")
    return nn.ModuleDict(
        {
            str(exit_layer): ExitBlock(model, exit_layer=exit_layer, source_layers=layers)
            for exit_layer, layers in sorted(sources.items())
        }
    )
