"""Tells by a hash whether two models agree in all that an exit block was trained on. Tested by test_weights_hash.py."""

import hashlib
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from app.errors import ConfigError

_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")  # the number of a block in a weight's name
_HEAD, _EMBEDDINGS = "lm_head.weight", re.compile(r"(?:^|\.)embed_tokens\.weight$")
_CHUNK = 2**22  # values that are converted at a time


def weights_hash(state: Mapping[str, Tensor], *, exit_layer: int) -> str:
    """The hash of a single exit; see `weights_hashes`."""
    return weights_hashes(state, [exit_layer])[exit_layer]


def weights_hashes(state: Mapping[str, Tensor], exit_layers: Collection[int]) -> dict[int, str]:
    """SHA-256, for each exit E, of all that the states leaving block E - 1, the final norm and the head depend on.

    A hash covers names, shapes and values of all weights but those of blocks E and later; each weight is read once.
    Values count as bfloat16, so that the type a file keeps them in does not matter. A head that equals the embeddings
    counts as tied, present or not. `state` has the weights by Hugging Face name, as of `PreTrainedModel.state_dict`.
    ConfigError if there is no block E - 1 in it.
    """
    layer_of = {name: int(found[1]) if (found := _BLOCK.search(name)) else None for name in state}
    for exit_layer in exit_layers:
        if exit_layer - 1 not in layer_of.values():
            last = max((layer for layer in layer_of.values() if layer is not None), default=-1)
            allowed = f"1..{last + 1}, the blocks whose weights are given"
            raise ConfigError("exit_layer", got=exit_layer, allowed=allowed)
    deepest = max(exit_layers, default=0)
    digests = {name: _digest(state[name]) for name, layer in layer_of.items() if layer is None or layer < deepest}
    embeddings = [digest for name, digest in digests.items() if _EMBEDDINGS.search(name)]
    if digests.get(_HEAD) in embeddings:
        del digests[_HEAD]

    def hash_of(exit_layer: int) -> str:
        below = {
            name: each for name, each in digests.items() if (layer := layer_of[name]) is None or layer < exit_layer
        }
        return hashlib.sha256(repr(sorted(below.items())).encode()).hexdigest()

    return {exit_layer: hash_of(exit_layer) for exit_layer in exit_layers}


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    for values in torch.split(tensor.detach().reshape(-1), _CHUNK):
        exact = values.to(torch.bfloat16) if values.is_floating_point() else values
        digest.update(exact.contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
