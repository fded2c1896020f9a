"""The first blocks of a model as a model of its own, which plain transformers runs.

What it says is what the exit says: norm and head are shared, and an exit with blocks of its own is a model of E + A
blocks. Tested by tests/unit/model/test_exit_model.py.
"""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from app.errors import check_early_exit
from app.model.config_check import build_without_memory
from app.model.exit_block import ExitBlock, config_of_blocks


def exit_model(model: PreTrainedModel, exit_layer: int, block: ExitBlock | None = None) -> PreTrainedModel:
    """Return a causal LM of the first blocks, which shares its modules with `model`; nothing is copied but A blocks.

    Args:
        model: A model of one of the types that `app.spans.decoder` knows; it may be on the meta device.
        exit_layer: E, the number of blocks, 1..num_layers - 1.
        block: The exit's own blocks and norm, if it has any. With an affine map, the result runs, but transformers
            cannot build it from its configuration.

    Raises:
        ConfigError: There is no such exit.
    """
    decoder: Any = model.get_decoder()
    check_early_exit("exit_layer", exit_layer, num_layers=len(decoder.layers))
    sources = [*range(exit_layer), *(() if block is None else block.source_layers)]
    first: PreTrainedModel = build_without_memory(config_of_blocks(model.config, sources), dtype=model.dtype)
    own: Any = first.get_decoder()
    own.embed_tokens, own.rotary_emb, own.norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
    own.layers = nn.ModuleList(decoder.layers[:exit_layer])
    if block is not None:
        own.norm = block.decoder.norm
        for layer in copy.deepcopy(block.decoder.layers):
            layer.self_attn.layer_idx = len(own.layers)  # where it keeps its keys and values
            own.layers.append(layer)
    first.set_output_embeddings(model.get_output_embeddings())
    first.generation_config = copy.deepcopy(model.generation_config)
    return first.train(model.training)
