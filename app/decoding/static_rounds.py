"""Rounds that the host starts with one transfer and ends with one read, however much is drafted in between.

Tested by tests/unit/decoding/test_static_rounds.py against the same properties as dynamic_rounds.py.
"""

from collections.abc import Callable, Sequence

import torch

from app.decoding.acceptance import check_finite
from app.decoding.drafters import FullModel
from app.decoding.dynamic_rounds import Round, paces_of
from app.decoding.result import Step
from app.decoding.rows import SequenceState
from app.decoding.settings import DecodingSettings
from app.decoding.static_program import StaticProgram
from app.decoding.static_rules import StaticGreedyRule, StaticSamplingRule
from app.protocols import ExitableDecoder

NewDrafter = Callable[[ExitableDecoder, DecodingSettings, int, int], FullModel]


class StaticRounds:
    """The rounds of one request; DynamicRounds has the same methods.

    Batch, capacity and length of a draft are rounded up to powers of two, so that few sequences of kernels serve all
    rounds. A row that ends is computed on and ignored, until half as many rows are enough. The decoder keeps buffers
    and sequences of the latest request that came to its end.
    """

    takes_rows = False  # the buffers are fixed for a request

    def __init__(
        self,
        decoder: ExitableDecoder,
        settings: DecodingSettings,
        rows: Sequence[SequenceState],
        new_drafter: NewDrafter,
        *,
        capacity: int,
        clock: Callable[[], float],
    ) -> None:
        self._clock, self._device = clock, decoder.device
        self._wants_confidence = any(row.policy.wants_confidence for row in rows)
        self._most = settings.num_draft_tokens or 0
        self._places = list(range(len(rows)))  # where each row that goes on is in the buffers
        self._decoder, batch = decoder, _power_of_two(len(rows))
        ends = [row.settings.eos_token_ids for row in rows] + [()] * (batch - len(rows))
        width = max(1, *map(len, ends))
        self._kind = (
            new_drafter,
            settings.exit_layer,
            self._most,
            settings.sampling,
            self._wants_confidence,
            settings.compile_rounds,
            batch,
            _power_of_two(capacity + self._most + 1),
            width,
            torch.is_inference_mode_enabled(),
        )
        kept, decoder.kept_program = decoder.kept_program, None  # it serves one request at a time
        if kept is not None and kept[0] == self._kind:
            self._program: StaticProgram = kept[1]
        else:
            self._program = self._new_program(settings, new_drafter)
        self._program.ends_BN.copy_(torch.tensor([[*ids, *[-1] * (width - len(ids))] for ids in ends]))
        if isinstance(rule := self._program.rule, StaticSamplingRule):
            seeds = [torch.randint(2**62, (1,), generator=row.generator, device=decoder.device) for row in rows]
            rule.seeds_B[: len(rows)] = torch.cat(seeds)

    def _new_program(self, settings: DecodingSettings, new_drafter: NewDrafter) -> StaticProgram:
        batch, capacity, width, _ = self._kind[-4:]
        drafter = new_drafter(self._decoder, settings, batch, 0)
        drafter.cache = cache = self._decoder.new_static_cache(batch_size=batch, capacity=capacity)
        rule: StaticGreedyRule | StaticSamplingRule
        if settings.sampling.greedy:
            rule = StaticGreedyRule(drafter.draft_ids, confidence=self._wants_confidence)
        else:
            seeds_B = torch.zeros_like(cache.lengths_B)
            rule = StaticSamplingRule(settings.sampling, drafter.draft_ids, seeds_B, self._decoder.vocab_size)
        sizes = {"most_drafts": self._most, "most_ends": width}
        return StaticProgram(drafter, cache, rule, **sizes, compiled=settings.compile_rounds)

    def prefill(self, rows: Sequence[SequenceState]) -> Round:
        """Run all prompts through the model, padded to one length; each yields its first new token."""
        prompts = [row.prompt for row in rows] + [[0]] * (len(self._program.ends_BN) - len(rows))
        longest = max(map(len, prompts))
        tokens_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self._device)
        outcome = self._program.prefill(tokens_BT, list(map(len, prompts))).tolist()
        steps = [self._step(outcome[place]) for place in self._places]
        return Round(steps, self._clock(), 0.0, 0.0)

    def round(self, rows: Sequence[SequenceState]) -> Round:
        """Draft, verify and settle for every row. All of it counts as time of verifying, which nothing divides."""
        started_at = self._clock()
        is_plain = any(pace.wants_plain_round() for pace in paces_of(rows))
        limits = [0 if is_plain else row.draft_limit() for row in rows]
        num_drafts = min(_power_of_two(max(limits)), self._most)
        if (needed := max(row.length for row in rows) + num_drafts + 1) > self._program.cache.capacity:
            self._program.grow(_power_of_two(needed))
        self._program.given_BG[: self._program.num_rows].copy_(self._given(rows, limits), non_blocking=True)
        outcome = self._program.round(num_drafts).tolist()  # the round's one wait
        ended_at = self._clock()
        steps = [self._step(outcome[place]) for place in self._places]
        for row, limit, step, place in zip(rows, limits, steps, self._places, strict=True):
            # A policy hears of each draft after which it was to decide, which no limit and no end had decided already.
            last = outcome[place][step.drafted - 1] if step.drafted else None
            asked = step.drafted - (step.drafted == limit or last in row.settings.eos_token_ids)
            for confidence in outcome[place][self._most : self._most + asked]:
                row.policy.goes_on(confidence)
            row.learn(step, seconds=ended_at - started_at)
        return Round(steps, ended_at, 0.0, ended_at - started_at)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only; they move together when half the batch has ended."""
        self._places = [self._places[row] for row in rows]
        batch = _power_of_two(len(rows))
        if batch < self._program.num_rows:
            unused = [place for place in range(self._program.num_rows) if place not in self._places]
            self._program.keep_rows([*self._places, *unused[: batch - len(rows)]])
            self._places = list(range(len(rows)))

    def end_drafting(self) -> None:
        """Nothing to drop: the buffers stay."""

    def end(self) -> None:
        """Leave buffers and recorded sequences to the next request of this kind; no round comes any more."""
        self._decoder.kept_program = self._kind, self._program

    def _given(self, rows: Sequence[SequenceState], limits: Sequence[int]) -> torch.Tensor:
        """What the host tells the device before a round [B, G], in memory that a CUDA device copies without a wait."""
        width = self._program.given_BG.shape[1]
        given = [[-1.0] + [0.0] * (width - 1) for _ in range(self._program.num_rows)]
        for row, limit, place in zip(rows, limits, self._places, strict=True):
            chances, least = row.policy.chances()
            given[place] = [float(limit), least, *chances]
        return torch.tensor(given, dtype=torch.float64, pin_memory=self._device.type == "cuda")

    def _step(self, outcome: Sequence[float]) -> Step:
        drafted, kept, token, finite = map(int, outcome[-4:])
        check_finite([1.0 if finite else float("nan")])
        drafts = [int(token) for token in outcome[:drafted]]
        return Step([*drafts[:kept], token], kept, tuple(drafts[kept:]))


def _power_of_two(number: int) -> int:
    """The least power of two that is no less, and 0 for 0 and below."""
    return 1 << (number - 1).bit_length() if number > 0 else 0
