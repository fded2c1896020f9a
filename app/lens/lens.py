"""Looks through a model at each of some prompts: greedy generation, then every layer's predictions.

Tested by tests/contract/test_lens.py.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from app.decoding.engine import decode_batch
from app.decoding.settings import DecodingSettings
from app.errors import ConfigError
from app.exits.layers_needed import LayersNeeded
from app.generation.loaded_model import LoadedModel
from app.lens.token_grid import TokenGrid, read_token_grid
from app.progress_log import TimeLeft
from app.text.tokenizer_files import check_same_tokens
from app.words import counted_of

_log = logging.getLogger(__name__)
_LOG_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Lens:
    """What one model did with the prompts.

    Attributes:
        name: Tells it from the other model of a page.
        path: What it was loaded from.
        dtype: Type of its weights, in words.
        grids: One for each prompt, at least one.
        seconds: Time of generation and of looking, all prompts together.
    """

    name: str
    path: str
    dtype: str
    grids: tuple[TokenGrid, ...]
    seconds: float

    @property
    def needed(self) -> LayersNeeded:
        """The layers that the tokens of all prompts needed."""
        return LayersNeeded.total([grid.needed for grid in self.grids])

    @property
    def num_rounded(self) -> int:
        """Tokens that one pass over the text chose otherwise than one pass a token: none but by rounding."""
        return sum(grid.num_rounded for grid in self.grids)


def look(loaded: LoadedModel, prompts: Sequence[list[int]], *, name: str, path: str, max_new_tokens: int) -> Lens:
    """Continue each prompt greedily with the full model, then look at every layer of what came.

    Args:
        prompts: Token ids of at least one prompt, which leave room for a token in the model's context.
        max_new_tokens: Most generated tokens of a prompt, at least 1. Fewer where the text or the context ends.
    """
    decoder, time_left = loaded.decoder, TimeLeft(len(prompts), seconds_between=_LOG_SECONDS)
    settings = DecodingSettings(max_new_tokens=max_new_tokens, eos_token_ids=loaded.eos_token_ids)
    grids = list[TokenGrid]()
    for prompt in prompts:
        (result,) = decode_batch(decoder, [prompt], strategy="autoregressive", settings=settings)
        grids.append(read_token_grid(decoder, prompt, result.tokens))
        if time_left.add(1) and len(grids) < len(prompts):
            _log.info("%s: %s, %s", name, counted_of(len(grids), len(prompts), "prompt"), time_left.in_words())
    return Lens(name=name, path=path, dtype=loaded.weights_type, grids=tuple(grids), seconds=time_left.seconds)


def check_comparable(first: LoadedModel, second: LoadedModel, *, got: str) -> None:
    """Raise ConfigError, for the second model with path `got`, unless both have the same tokens and as many blocks."""
    names = "first model", "second model"
    check_same_tokens(first.tokenizer, second.tokenizer, got=got, field="model", names=names)
    if (depth := first.decoder.num_layers) != second.decoder.num_layers:
        allowed = f"a second model of {depth} blocks, like the first"
        fix = f"it has {second.decoder.num_layers}: look at each by itself"
        raise ConfigError("model", got=got, allowed=allowed, fix=fix)
