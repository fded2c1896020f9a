"""Which drafted tokens the full model keeps, and the token it adds: a rule for greedy decoding and one for sampling.

Shape legend: `B` sequences, `T` drafted tokens, `S` = T + 1 verified positions, `V` vocabulary, `V'` draft vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from app.decoding.rows import SequenceState, contexts
from app.decoding.sampling import LogitsProcessor, SamplingSettings, draw, over_vocabulary, probabilities
from app.errors import NotFiniteError

Drafts = Sequence[Sequence[int]]  # what was drafted for each sequence in this round


def accept_greedy(drafts: Sequence[int], choices: Sequence[int]) -> tuple[int, int]:
    """Keep the longest prefix of T drafts that equals the full model's S choices; add its next choice.

    Returns:
        The number kept, and the full model's token after them: a correction, or a bonus after a full accept.
    """
    pairs = zip(drafts, choices, strict=False)  # there is one choice more
    accepted = next((i for i, (draft, choice) in enumerate(pairs) if draft != choice), len(drafts))
    return accepted, choices[accepted]


def accept_sampled(
    drafts_T: Tensor, *, draft_probs_TV: Tensor | None, target_probs_SV: Tensor, uniforms_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (Leviathan et al. 2023, algorithm 1): kept tokens are distributed as the target's own.

    Token t was drawn from `draft_probs_TV[t]`; without these, it was certain. The targets are the full model's
    distributions at the same positions and the one after them; `uniforms_T` are independent draws from [0, 1).

    Returns:
        The number of drafts kept (no dimensions), and the distribution [V] from which to draw the next token.
    """
    draft_T1 = drafts_T[:, None]
    draft_prob_T = 1.0 if draft_probs_TV is None else draft_probs_TV.gather(-1, draft_T1)[:, 0]
    target_prob_T = target_probs_SV[:-1].gather(-1, draft_T1)[:, 0]
    keep_T = uniforms_T * draft_prob_T < target_prob_T  # u < min(1, target / draft), without dividing
    accepted = keep_T.long().cumprod(0).sum()

    # The residual after a rejection is norm(max(0, target - draft)). After a full accept the draft counts as zeros.
    # index_select keeps the number on the device, where indexing with a tensor would wait for it.
    target_V = target_probs_SV.index_select(0, accepted[None])[0]
    if draft_probs_TV is None:  # the target without the rejected token
        token_1 = pad(drafts_T, (0, 1)).index_select(0, accepted[None])
        residual_V = target_V.scatter(0, token_1, target_V.gather(0, token_1) * (accepted == len(drafts_T)))
    else:
        draft_V = pad(draft_probs_TV, (0, 0, 0, 1)).index_select(0, accepted[None])[0]
        residual_V = (target_V - draft_V).clamp(min=0.0)
    mass = residual_V.sum()
    # Equal distributions leave no residual. Only rounding can reject then, and the target itself is right.
    return accepted, torch.where(mass > 0, residual_V / mass, target_V)


class Drafted(NamedTuple):
    """A drafted token of each sequence, on the device to be fed on and on the host to be looked at."""

    tokens_B: Tensor
    tokens: list[int]
    confidences: list[float]  # empty unless asked for


class _Rule:
    """What both rules do with the drafter's logits.

    Args:
        settings: How tokens are chosen.
        draft_ids: The token ids [V'] that these logits are of; None where these are all.
        vocab_size: V.
    """

    def __init__(self, settings: SamplingSettings, draft_ids: Tensor | None, vocab_size: int) -> None:
        self._settings, self._draft_ids, self._vocab_size = settings, draft_ids, vocab_size
        # A processor asks for the scores of all tokens.
        self._chosen_ids = draft_ids if settings.processor is None else None

    def _draft_scores(self, logits_BV: Tensor, rows: Sequence[SequenceState], drafts: Drafts) -> Tensor:
        """Scores of the tokens of `_chosen_ids`, or of all, from the logits [B, V'] of drafts."""
        if self._settings.processor is None:
            return logits_BV
        whole_BV = over_vocabulary(logits_BV, self._draft_ids, self._vocab_size)
        return process(whole_BV[:, None], rows, drafts, self._settings.processor, first=True)[:, 0]

    def _ids(self, choices_B: Tensor) -> Tensor:
        """The token ids of indices into these scores."""
        return choices_B if self._chosen_ids is None else self._chosen_ids[choices_B]

    def _over_all(self, probs_TV: Tensor) -> Tensor:
        """Probabilities of all tokens [T, V] from those of `_chosen_ids`."""
        return over_vocabulary(probs_TV, self._chosen_ids, self._vocab_size, outside=0.0)


class GreedyRule(_Rule):
    """Takes the most probable token, so that the output is the full model's greedy output.

    SamplingRule has the same methods. `max` is used for its index, since `argmax` takes four times as long in bfloat16
    on a processor; of equal scores both take the first, and a NaN is the highest to both.
    """

    def __init__(
        self, settings: SamplingSettings, draft_ids: Tensor | None, vocab_size: int, *, confidence: bool
    ) -> None:
        super().__init__(settings, draft_ids, vocab_size)
        self._confidence = confidence

    def draft(self, logits_BV: Tensor, rows: Sequence[SequenceState], drafts: Drafts, live: Sequence[bool]) -> Drafted:
        """Choose a token for each sequence from the drafter's logits [B, V'].

        Sequences that are not `live` no longer draft: they get any token, and none of their randomness is used.
        """
        scores_BV = self._draft_scores(logits_BV, rows, drafts)
        highest_B, choices_B = scores_BV.max(-1)
        tokens_B = self._ids(choices_B)
        if not self._confidence:
            return Drafted(tokens_B, tokens_B.tolist(), [])
        confidence_B = (highest_B.float() - scores_BV.float().logsumexp(-1)).exp()
        tokens, confidences = torch.stack((tokens_B.double(), confidence_B.double())).tolist()  # one wait for both
        return Drafted(tokens_B, [int(token) for token in tokens], confidences)

    def verify(
        self, logits_BSV: Tensor, rows: Sequence[SequenceState], drafts: Drafts, tokens_BS: Tensor
    ) -> list[tuple[int, int]]:
        """For each sequence how many of its drafts to keep, and the full model's token after them.

        `tokens_BS` are the tokens before each position of the logits: the latest settled one, the drafts and padding.
        """
        highest_BS, choices_BS = process(logits_BSV, rows, drafts, self._settings.processor).max(-1)
        choices, highest = torch.stack((choices_BS.double(), highest_BS.double())).tolist()  # one wait
        outcomes = []
        for drafted, ids, scores in zip(drafts, choices, highest, strict=True):
            check_finite(scores[: len(drafted) + 1])  # padding follows
            outcomes.append(accept_greedy(drafted, [int(each) for each in ids]))
        return outcomes


class SamplingRule(_Rule):
    """Draws tokens from processed distributions, so that the output is distributed as the full model's.

    Every sequence draws from its own generator, and only for itself, so that it comes out as it would alone. Drafts
    and their distributions stay on the device; only a processor needs token ids sent there. Drafts that were not drawn
    here are certain.
    """

    def __init__(self, settings: SamplingSettings, draft_ids: Tensor | None, vocab_size: int) -> None:
        super().__init__(settings, draft_ids, vocab_size)
        self._draft_probs: dict[int, list[Tensor]] = {}  # by index of the row, each [1, V']

    def draft(self, logits_BV: Tensor, rows: Sequence[SequenceState], drafts: Drafts, live: Sequence[bool]) -> Drafted:
        probs_BV = probabilities(self._draft_scores(logits_BV, rows, drafts), settings=self._settings)
        choices_B = torch.zeros(len(rows), dtype=torch.long, device=probs_BV.device)
        for i, row in enumerate(rows):
            if live[i]:
                assert row.generator is not None
                choices_B[i : i + 1] = draw(probs_BV[i], generator=row.generator)
                self._draft_probs.setdefault(row.index, []).append(probs_BV[i : i + 1])
        confidence_B = probs_BV.gather(-1, choices_B[:, None])[:, 0]
        tokens_B = self._ids(choices_B)
        tokens, confidences = torch.stack((tokens_B.double(), confidence_B.double())).tolist()
        check_finite([confidence for confidence, drafting in zip(confidences, live, strict=True) if drafting])
        return Drafted(tokens_B, [int(token) for token in tokens], confidences)

    def verify(
        self, logits_BSV: Tensor, rows: Sequence[SequenceState], drafts: Drafts, tokens_BS: Tensor
    ) -> list[tuple[int, int]]:
        scores_BSV = process(logits_BSV, rows, drafts, self._settings.processor)
        outcomes = []
        for row, drafted, tokens_S, probs_SV in zip(
            rows, drafts, tokens_BS, probabilities(scores_BSV, settings=self._settings), strict=True
        ):
            assert row.generator is not None
            drawn = self._draft_probs.pop(row.index, None)
            accepted, next_probs_V = accept_sampled(
                tokens_S[1 : len(drafted) + 1],
                draft_probs_TV=None if drawn is None else self._over_all(torch.cat(drawn)),
                target_probs_SV=probs_SV[: len(drafted) + 1],
                uniforms_T=torch.rand(len(drafted), generator=row.generator, device=probs_SV.device),
            )
            token_1 = draw(next_probs_V, generator=row.generator)
            outcomes.append(torch.stack([accepted, token_1[0], next_probs_V.gather(0, token_1)[0]]).double())
        settled = torch.stack(outcomes).tolist()  # one wait for all rows
        check_finite([probability for *_, probability in settled])
        return [(int(accepted), int(token)) for accepted, token, _ in settled]


ChoiceRule = GreedyRule | SamplingRule


def check_finite(values: Sequence[float]) -> None:
    """Refuse scores or probabilities of chosen tokens that are not finite."""
    if not all(map(math.isfinite, values)):
        raise NotFiniteError(
            "the model's logits are not finite: look for NaN or infinity in its weights, or give a number type of more"
            " range (--dtype float32)"
        )


def process(
    logits_BSV: Tensor,
    rows: Sequence[SequenceState],
    drafts: Drafts,
    processor: LogitsProcessor | None,
    *,
    first: bool = False,
) -> Tensor:
    """Apply the processor at each position, given everything before it: prompt, settled and drafted tokens.

    The positions are the latest settled token and the drafts after it, or the latest draft alone if `first`. Padding
    stays as it is. Without a processor the scores are the logits themselves.
    """
    if processor is None:
        return logits_BSV
    scores_BSV = logits_BSV.to(torch.float32, copy=True)
    for i, (ids_1S, drafted) in enumerate(zip(contexts(rows, drafts, device=scores_BSV.device), drafts, strict=True)):
        settled = ids_1S.shape[1] - len(drafted)
        lengths = [ids_1S.shape[1]] if first else range(settled, ids_1S.shape[1] + 1)
        for position, length in enumerate(lengths):
            scores_BSV[i, position] = processor(ids_1S[:, :length], scores_BSV[i, position][None])[0]
    return scores_BSV
