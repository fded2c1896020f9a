"""Decoding of one prompt, which is what most tests want."""

from collections.abc import Callable, Sequence

import torch

from app.decoding.engine import OnStep, decode_batch
from app.decoding.result import DecodingResult, Step
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import Strategy
from app.protocols import ExitableDecoder


def decode(
    decoder: ExitableDecoder,
    prompt_tokens: Sequence[int],
    *,
    strategy: Strategy,
    settings: DecodingSettings,
    generator: torch.Generator | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> DecodingResult:
    """`decode_batch` with one prompt."""
    observer: OnStep | None = None if on_step is None else lambda _, step: on_step(step)
    generators = None if generator is None else [generator]
    return decode_batch(
        decoder, [prompt_tokens], strategy=strategy, settings=settings, generators=generators, on_step=observer
    )[0]
