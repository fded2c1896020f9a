"""Which drafted tokens the full model keeps, and the token it adds.

Two pure rules, and a class for each that applies it to logits: to decoding strategies the two look alike.
Shape legend: `T` drafted tokens, `S` = T + 1 verified positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from app.decoding.sampling import SamplingSettings, draw, probabilities
from app.errors import ConfigError


def accept_greedy(drafts: Sequence[int], choices: Sequence[int]) -> tuple[int, int]:
    """Keep the longest prefix of T drafts that equals the full model's S choices; add its next choice.

    Returns:
        The number kept, and the full model's token after them: a correction, or a bonus after a full accept.
    """
    pairs = zip(drafts, choices, strict=False)  # there is one choice more
    accepted = next((i for i, (draft, choice) in enumerate(pairs) if draft != choice), len(drafts))
    return accepted, choices[accepted]


def accept_sampled(
    drafts_T: Tensor, *, draft_probs_TV: Tensor, target_probs_SV: Tensor, uniforms_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (Leviathan et al. 2023, algorithm 1): kept tokens are distributed as the target's own.

    Args:
        drafts_T: Drafted token ids [T], token t drawn from `draft_probs_TV[t]`.
        draft_probs_TV: Laws of the early exit [T, V].
        target_probs_SV: Laws of the full model at the same positions and the one after [S, V].
        uniforms_T: Independent draws from [0, 1), one for each draft.

    Returns:
        The number of drafts kept (no dimensions), and the law [V] from which the next token must be drawn.
    """
    draft_T1 = drafts_T[:, None]
    draft_prob_T = draft_probs_TV.gather(-1, draft_T1)[:, 0]
    target_prob_T = target_probs_SV[:-1].gather(-1, draft_T1)[:, 0]
    keep_T = uniforms_T * draft_prob_T < target_prob_T  # u < min(1, target / draft), without dividing
    accepted = keep_T.long().cumprod(0).sum()

    # After a rejection norm(max(0, target - draft)). A bonus is the same against a draft that proposed nothing.
    residual_V = (target_probs_SV[accepted] - pad(draft_probs_TV, (0, 0, 0, 1))[accepted]).clamp(min=0.0)
    mass = residual_V.sum()
    # Equal laws leave no residual; rounding alone can then reject, and the target itself is the right law.
    return accepted, torch.where(mass > 0, residual_V / mass, target_probs_SV[accepted])


class ChoiceRule(Protocol):
    """How tokens are drafted and verified."""

    def draft(self, logits_V: Tensor) -> int:
        """A token proposed from an early exit's logits [V]."""

    def verify(self, drafts: Sequence[int], logits_SV: Tensor) -> tuple[int, int]:
        """How many of the T tokens drafted since the last call to keep, and the full model's token after them."""


class GreedyRule:
    """Always the most probable token; the output is the full model's greedy output."""

    def draft(self, logits_V: Tensor) -> int:
        """The most probable token."""
        return int(logits_V.argmax())

    def verify(self, drafts: Sequence[int], logits_SV: Tensor) -> tuple[int, int]:
        """`accept_greedy` on the most probable tokens."""
        return accept_greedy(drafts, logits_SV.argmax(-1).tolist())


class SamplingRule:
    """Tokens drawn from processed laws; the output is distributed as the full model's."""

    def __init__(self, *, settings: SamplingSettings, generator: torch.Generator) -> None:
        self._settings, self._generator = settings, generator
        self._draft_probs: list[Tensor] = []

    def draft(self, logits_V: Tensor) -> int:
        """A token drawn from the early exit's law, which is kept for `verify`."""
        self._draft_probs.append(probabilities(logits_V, settings=self._settings))
        return int(draw(self._draft_probs[-1], generator=self._generator))

    def verify(self, drafts: Sequence[int], logits_SV: Tensor) -> tuple[int, int]:
        """`accept_sampled` on the laws of the drafts and of the full model."""
        target_probs_SV = probabilities(logits_SV, settings=self._settings)
        accepted, law_V = accept_sampled(
            torch.tensor(drafts, dtype=torch.long, device=logits_SV.device),
            draft_probs_TV=torch.stack(self._draft_probs) if drafts else target_probs_SV[:0],
            target_probs_SV=target_probs_SV,
            uniforms_T=torch.rand(len(drafts), generator=self._generator, device=logits_SV.device),
        )
        self._draft_probs.clear()
        token = draw(law_V, generator=self._generator)
        num_accepted, next_token = torch.stack([accepted, token[0]]).tolist()  # the round's one wait for the device
        return num_accepted, next_token


def choice_rule(*, settings: SamplingSettings, generator: torch.Generator | None, device: torch.device) -> ChoiceRule:
    """The rule for these settings; sampling draws from `generator`, which must be on `device`."""
    if settings.greedy:
        return GreedyRule()
    if generator is None or generator.device.type != device.type:
        got = None if generator is None else f"one on {generator.device}"
        raise ConfigError("generator", got=got, allowed=f"a torch.Generator on {device} when temperature > 0")
    return SamplingRule(settings=settings, generator=generator)
