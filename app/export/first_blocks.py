"""The first blocks of a model with their weights, for export. Tested by tests/contract/test_export.py."""

from transformers import GenerationConfig, PreTrainedModel

from app.errors import ConfigError, check_choice
from app.export.directory import Weights
from app.model.exit_block import affine_exits, exit_blocks_of
from app.model.exit_model import exit_model
from app.model_files.decoding_defaults import untuned_generation_config
from app.model_files.exit_blocks import StoredExitBlocks
from app.model_files.exit_origin import exit_origin_file
from app.spans.decoder import SUPPORTED_MODEL_TYPES


def first_blocks(
    model: PreTrainedModel, weights: Weights, exits: StoredExitBlocks | None, *, exit_layer: int
) -> tuple[PreTrainedModel, Weights, bytes]:
    """The model of the first blocks and the exit's own, its weights, and the content of EXIT_ORIGIN_FILE: whose it is.

    The whole model may be on the meta device. What `layerskip tune` chose for it is left out of the generation config.
    ConfigError if there is no such exit, it has an affine map, or the model is of a type whose exits are not known.
    """
    check_choice("model_type", model.config.model_type, SUPPORTED_MODEL_TYPES)
    if exits is not None and exit_layer in affine_exits(exits.state):
        fix = "this one has an affine map of its own, which no such model has"
        raise ConfigError("exit_layer", got=exit_layer, allowed="an exit that is an ordinary model", fix=fix)
    sources = {} if exits is None else {layer: own for layer, own in exits.sources.items() if layer == exit_layer}
    block = exit_blocks_of(model, sources)[str(exit_layer)] if sources else None
    first = exit_model(model, exit_layer, block)  # type: ignore[arg-type]
    first.generation_config = GenerationConfig.from_dict(untuned_generation_config(model))
    every = weights if exits is None else weights.with_others(exits.state)
    prefix = f"{model.base_model_prefix}."
    names = {name: name for name in first.state_dict()}
    if block is not None:
        for own in block.state_dict():
            _, part, *rest = own.split(".")  # decoder.layers.0.mlp.up_proj.weight, decoder.norm.weight
            if part == "layers":
                rest[0] = str(exit_layer + int(rest[0]))
            names[prefix + ".".join([part, *rest])] = f"{exit_layer}.{own}"
    shapes = {name: every.shapes[stored] for name, stored in names.items() if stored in every.shapes}
    below = exit_model(model, exit_layer, None).state_dict().keys() & weights.shapes.keys()
    origin = exit_origin_file({name: weights.read(name) for name in below}, exit_layer=exit_layer)
    return first, every._replace(shapes=shapes, read=lambda name: every.read(names[name])), origin
