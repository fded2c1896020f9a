"""Exit blocks on the disk: `exit_blocks.safetensors` beside a model, which plain transformers does not look at.

The file holds the exit blocks' weights under names of their own. Its metadata say of each exit which of the model's
blocks its own began as, and the hash of all that it was trained on (`app.model.weights_hash`).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from app.checkpoints.weights import EXIT_BLOCKS_KEY, EXIT_BLOCKS_PREFIX, is_trained_weights, open_trained_weights
from app.errors import CheckpointError, UserError, shortened
from app.model.exit_block import ExitBlock, affine_exits, exit_blocks_of
from app.model.weights_hash import weights_hashes
from app.model_files.open import load_for_decoding

EXIT_BLOCKS_FILE = "exit_blocks.safetensors"
_REMOVE = f"Remove {EXIT_BLOCKS_FILE} to decode without exit blocks"
_FORMAT, _SOURCES, _HASHES = "layerskip_exit_blocks", "source_layers", "weights_hashes"


class StoredExitBlocks(NamedTuple):
    """Exit blocks as they are stored, in a directory or in a checkpoint.

    Attributes:
        state: Their weights, by the names of `exit_blocks_of`.
        sources: Exit layer -> which of the model's blocks its own began as.
        hashes: Exit layer -> hash of what it was trained on; None in a checkpoint, which holds the model itself.
    """

    state: Mapping[str, Tensor]
    sources: Mapping[int, list[int]]
    hashes: Mapping[int, str] | None

    def as_file(self, model_state: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> bytes:
        """The content of an exit block file beside a model with these weights, by Hugging Face name, in this type."""
        hashes = weights_hashes(model_state, self.sources)
        metadata = {_FORMAT: "1", _SOURCES: json.dumps(self.sources), _HASHES: json.dumps(hashes)}
        return save({name: each.detach().to(dtype).contiguous().cpu() for name, each in self.state.items()}, metadata)


def stored_exit_blocks(path: str | Path) -> StoredExitBlocks | None:
    """The exit blocks that come with a model directory or a checkpoint of ours; None for anything else.

    CheckpointError if their file is damaged, or their weights are not finite.
    """
    file = Path(path) / EXIT_BLOCKS_FILE
    if is_trained_weights(path):
        metadata = open_trained_weights(path).metadata
        if EXIT_BLOCKS_KEY not in metadata:
            return None
        stored = StoredExitBlocks(metadata.get(EXIT_BLOCKS_PREFIX, {}), metadata[EXIT_BLOCKS_KEY], None)
    elif os.path.lexists(file):  # a link to nothing is a fault, and no absence
        stored = _read(file)
    else:
        return None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in stored.state.values()):
        raise CheckpointError(f"{path}: the weights of its exit blocks are not finite")
    return stored


def _read(file: Path) -> StoredExitBlocks:
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
    except (OSError, SafetensorError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged ({shortened(error)}). {_REMOVE}") from error
    return StoredExitBlocks(state, sources, hashes)


def load_exit_blocks(path: str, model: PreTrainedModel) -> dict[int, ExitBlock]:
    """The exit blocks that came with `model`, loaded from `path`, by exit layer; {} for none.

    They take their classes from its blocks, are of its type and on its device, and are in eval mode. CheckpointError if
    they are damaged, or were trained for another model.
    """
    if (stored := stored_exit_blocks(path)) is None:
        return {}
    try:
        blocks = exit_blocks_of(model, stored.sources, affine=affine_exits(stored.state))
        blocks.load_state_dict(stored.state)
    except (UserError, RuntimeError, TypeError) as error:
        found = f"its exit blocks are not of this architecture ({shortened(error)})"
        raise CheckpointError(f"{path}: {found}. {_REMOVE}") from error
    if stored.hashes is not None:
        # Whoever loads in float16 rounds otherwise than to bfloat16, in which the hash was taken.
        own = model if model.dtype != torch.float16 else load_for_decoding(path, dtype=None)[0]
        for exit_layer, found in weights_hashes(own.state_dict(), stored.sources).items():
            if found != stored.hashes.get(exit_layer):
                other = (
                    f"blocks below {exit_layer}, embeddings, final norm or head are not those that exit {exit_layer}"
                )
                raise CheckpointError(f"{Path(path) / EXIT_BLOCKS_FILE}: {other} was trained for. {_REMOVE}")
    blocks.to(device=model.device, dtype=model.dtype).eval()
    return {int(exit_layer): block for exit_layer, block in blocks.items()}  # type: ignore[misc]
