"""Exit blocks on the disk: `exit_blocks.safetensors` beside a model, which plain transformers does not look at.

The file holds the exit blocks' weights under names of their own. Its metadata say of each exit which of the model's
blocks its own began as, and the hash of all that it was trained on (`app.model.weights_hash`).
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from app.errors import CheckpointError, UserError, shortened
from app.model.exit_block import ExitBlock, exit_blocks_of
from app.model.weights_hash import weights_hash
from app.model_files.open import load_for_decoding

EXIT_BLOCKS_FILE = "exit_blocks.safetensors"
_FORMAT, _SOURCES, _HASHES = "layerskip_exit_blocks", "source_layers", "weights_hashes"


def exit_blocks_file(
    state: Mapping[str, Tensor], source_layers: Mapping[int, list[int]], model_state: Mapping[str, Tensor]
) -> bytes:
    """The content of an exit block file.

    Args:
        state: The weights of `exit_blocks_of`, by its own names.
        source_layers: Exit layer -> which of the model's blocks its own began as.
        model_state: The weights of the model that they were trained for, by Hugging Face name.
    """
    hashes = {exit_layer: weights_hash(model_state, exit_layer=exit_layer) for exit_layer in source_layers}
    metadata = {_FORMAT: "1", _SOURCES: json.dumps(source_layers), _HASHES: json.dumps(hashes)}
    return save({name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}, metadata)


def load_exit_blocks(path: str, model: PreTrainedModel) -> dict[int, ExitBlock]:
    """The exit blocks that come with a model, by exit layer, in its type, on its device and in eval mode; {} for none.

    Args:
        path: What the model was loaded from.
        model: The model, from whose blocks they take their classes.

    Raises:
        CheckpointError: The file is damaged, or was made for another model.
    """
    if not (file := Path(path) / EXIT_BLOCKS_FILE).is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
        if metadata.get(_FORMAT) != "1":
            raise ValueError(f"its format is {metadata.get(_FORMAT)!r}, and 1 is known")
        sources, hashes = (
            {int(exit_layer): told for exit_layer, told in json.loads(metadata[key]).items()}
            for key in (_SOURCES, _HASHES)
        )
        blocks = exit_blocks_of(model, sources)
        blocks.load_state_dict(state)
    except (
        OSError,
        SafetensorError,
        UserError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        found = f"damaged, or of a model of another architecture ({shortened(error)})"
        raise CheckpointError(f"{file}: {found}. Remove the file to decode without exit blocks") from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise CheckpointError(f"{file}: its weights are not finite")
    # Whoever loads in float16 rounds otherwise than to bfloat16, in which the hash was taken.
    own = model if model.dtype != torch.float16 else load_for_decoding(path, dtype=None)[0]
    for exit_layer in sources:
        if weights_hash(own.state_dict(), exit_layer=exit_layer) != hashes.get(exit_layer):
            other = f"blocks below {exit_layer}, embeddings, final norm or head are not those that exit {exit_layer}"
            raise CheckpointError(f"{file}: {other} was trained for. Remove the file to decode without exit blocks")
    blocks.to(device=model.device, dtype=model.dtype).eval()
    return {int(exit_layer): block for exit_layer, block in blocks.items()}  # type: ignore[misc]
