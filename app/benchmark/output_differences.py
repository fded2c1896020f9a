"""Outputs that differ from autoregressive decoding: how many, and whether rounding can have decided there.

A pass over several positions rounds otherwise than passes over one, so where two tokens are nearly equally likely the
argmax may flip. At the first token that differs, the full model's logits are recomputed on the autoregressive path. The
gap between the logits of the two tokens tells such a tie from a bug.

Shape legend: `S` tokens so far, `V` vocabulary.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import floor, log2
from typing import NamedTuple

import torch
from torch import Tensor

from app.benchmark.alternation import Measurement, Prompts
from app.decoding.engine import decode_batch
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import is_lossless
from app.protocols import ExitableDecoder

_log = logging.getLogger(__name__)

# Gaps that rounding can bridge, in spacings of the logits' dtype: several times the largest difference seen among the
# best tokens of SmolLM2-135M between passes over 2 to 9 positions and over one (2.5 in bfloat16, 19 in float32).
_BRIDGEABLE = {torch.float32: 256.0}
_BRIDGEABLE_ELSE = 8.0


class _Fork(NamedTuple):
    """The point at which an output leaves the autoregressive one."""

    context: tuple[int, ...]  # the prompt, and the tokens that both have
    expected: int | None  # None where the autoregressive output ends here
    found: int | None  # None where the other output ends here


class _Gap(NamedTuple):
    logits: float
    spacings: float
    bridgeable: bool


@dataclass(frozen=True, kw_only=True)
class OutputDifferences:
    """How the outputs of a strategy differ from those of autoregressive decoding."""

    num_prompts: int
    num_differing: int  # prompts with other tokens in any repeat
    # Differing prompts where rounding cannot have decided: the gap is too large, or there is none because one output
    # ends where the other goes on. 0 for a lossy strategy, whose gaps are not measured.
    num_unexplained: int = 0
    # Largest gap between the two tokens at the first one that differs; None without differences.
    largest_logit_gap: float | None = None
    # That gap in spacings of the logits' dtype at the largest logit there.
    largest_gap_in_spacings: float | None = None

    def __str__(self) -> str:
        """Say for instance "2 of 164 prompts differ; largest logit gap 0.03 (0.5 spacings)"."""
        said = f"{self.num_differing} of {self.num_prompts} prompts differ"
        if self.largest_logit_gap is None:
            return said
        return f"{said}; largest logit gap {self.largest_logit_gap:.2g} ({self.largest_gap_in_spacings:.3g} spacings)"


def find_output_differences(
    decoder: ExitableDecoder,
    batches: Sequence[Prompts],
    measurements: Sequence[Measurement],
    *,
    eos_token_ids: Sequence[int],
) -> list[OutputDifferences]:
    """Compare the outputs of each measurement with those of the first, and warn of what rounding does not explain.

    The model decodes a batch in which something differs once more. `batches` are the prompts as they were decoded;
    those after the last that was measured do not count. The first measurement is of autoregressive decoding.
    """
    baseline = measurements[0]
    forks = [list(_forks(decoder.num_layers, batches, baseline, measurement)) for measurement in measurements]
    gaps: dict[_Fork, _Gap] = {}
    for index, prompts in enumerate(batches):
        if wanted := {fork for own in forks for of_batch, fork in own if of_batch == index}:
            gaps |= _measure_gaps(decoder, prompts, wanted, eos_token_ids)
    found = []
    for measurement, own in zip(measurements, forks, strict=True):
        differences = _sum_up(measurement.identical_to(baseline), [gaps.get(fork) for _, fork in own])
        found.append(differences)
        if differences.num_unexplained:
            _log.warning(
                "%s: outputs differ from autoregressive decoding, %d of them by more than rounding explains (%s);"
                " please report it",
                measurement.contender.label,
                differences.num_unexplained,
                differences,
            )
    return found


def _forks(
    num_layers: int, batches: Sequence[Prompts], baseline: Measurement, other: Measurement
) -> Iterator[tuple[int, _Fork]]:
    """Yield the index of the batch and the fork of each prompt that differs somewhere; none of a lossy strategy."""
    given = other.contender
    if not is_lossless(given.strategy, exit_layer=given.settings.exit_layer, num_layers=num_layers):
        return
    for index, (prompts, expected, repeats) in enumerate(zip(batches, baseline.runs, other.runs, strict=False)):
        for row, prompt in enumerate(prompts):
            right = expected[0][row].tokens
            wrong = next((rows[row].tokens for rows in repeats if rows[row].tokens != right), right)
            if wrong != right:
                same = next((i for i, pair in enumerate(zip(right, wrong, strict=False)) if pair[0] != pair[1]), None)
                same = min(len(right), len(wrong)) if same is None else same
                ends = (tokens[same] if same < len(tokens) else None for tokens in (right, wrong))
                yield index, _Fork((*prompt, *right[:same]), *ends)


def _measure_gaps(
    decoder: ExitableDecoder, prompts: Prompts, forks: Iterable[_Fork], eos_token_ids: Sequence[int]
) -> dict[_Fork, _Gap]:
    """Decode the batch again, one token at a time, and read the logits where outputs leave it."""
    at = {fork.context: [other for other in forks if other.context == fork.context] for fork in forks}
    dtype = decoder.unembed(decoder.embed(torch.zeros(1, 1, dtype=torch.long, device=decoder.device))).dtype
    gaps: dict[_Fork, _Gap] = {}

    def look(ids_1S: Tensor, scores_1V: Tensor) -> Tensor:
        for fork in at.get(tuple(ids_1S[0].tolist()), ()):
            if fork.expected is not None and fork.found is not None:
                gap = abs(float(scores_1V[0, fork.expected] - scores_1V[0, fork.found]))
                spacings = gap / _spacing(float(scores_1V.abs().max()), dtype)
                gaps[fork] = _Gap(gap, spacings, spacings <= _BRIDGEABLE.get(dtype, _BRIDGEABLE_ELSE))
        return scores_1V

    settings = DecodingSettings(
        max_new_tokens=1 + max(map(len, at)) - min(map(len, prompts)),
        eos_token_ids=tuple(eos_token_ids),
        sampling=SamplingSettings(processor=look),
    )
    decode_batch(decoder, prompts, strategy="autoregressive", settings=settings)
    return gaps


def _spacing(magnitude: float, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return float(info.eps * 2.0 ** floor(log2(max(magnitude, info.tiny))))


def _sum_up(identical: Sequence[bool], gaps: Sequence[_Gap | None]) -> OutputDifferences:
    """Return the differences of one measurement; a gap of None could not be measured."""
    known = [gap for gap in gaps if gap is not None]
    largest = max(known, default=None)
    return OutputDifferences(
        num_prompts=len(identical),
        num_differing=identical.count(False),
        num_unexplained=sum(gap is None or not gap.bridgeable for gap in gaps),
        largest_logit_gap=largest and largest.logits,
        largest_gap_in_spacings=largest and largest.spacings,
    )
