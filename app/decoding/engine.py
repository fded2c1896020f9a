"""The one way to decode: check, draft, verify, stop, count and time.

Shape legend: `B` sequences, `T` prompt tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import torch

from app.decoding.acceptance import ChoiceRule, GreedyRule, SamplingRule
from app.decoding.cost_model import CostModel
from app.decoding.draft_policy import POLICIES, Pace
from app.decoding.drafters import FullModel
from app.decoding.result import DecodingResult, Step
from app.decoding.rows import SequenceState
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import STRATEGIES, Strategy, check_settings
from app.errors import ConfigError, check_choice, check_range
from app.protocols import ExitableDecoder

OnStep = Callable[[int, Step], None]
_RESERVE = 256  # new positions to reserve at first, since a large budget is often not used up
_NO_DRAFTS = CostModel(plain_step=1.0, draft_step=1.0, draft_tail=0.0, verify=1.0, extra_token=0.0)


class DecodingInterrupted(KeyboardInterrupt):
    """Ctrl-C during decoding; `results` has what was decoded so far, one result for each prompt."""

    def __init__(self, results: list[DecodingResult]) -> None:
        super().__init__("decoding was interrupted")
        self.results = results


def decode_batch(
    decoder: ExitableDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    strategy: Strategy,
    settings: DecodingSettings,
    generators: Sequence[torch.Generator] | None = None,
    on_step: OnStep | None = None,
) -> list[DecodingResult]:
    """Continue prompts of any lengths together; each comes out as it would alone, and never exceeds the context.

    Arguments and refusals are those of `Decoding`. `on_step` is called with a prompt's index and what a round settled
    for it; its time counts as decode time.

    Raises:
        DecodingInterrupted: Ctrl-C was pressed; the error has what was decoded.
    """
    decoding = Decoding(decoder, prompts, strategy=strategy, settings=settings, generators=generators)
    try:
        for index, step in decoding:
            if on_step is not None:
                on_step(index, step)
    except KeyboardInterrupt:
        raise DecodingInterrupted(decoding.results()) from None
    return decoding.results()


class Decoding:
    """Prompts while they are decoded together: iterate over it once for what each round settles.

    Every sequence accepts its own number of drafts; one that ends leaves the batch. Whoever iterates may stop at any
    time. Rounds run under `torch.no_grad`, not `inference_mode`: the weights may be those of a training run, and
    inference tensors do not mix with DTensor. A caller that owns the model can iterate inside `inference_mode`, which
    is about 10 % faster on a CPU.

    Args:
        decoder: The model, in eval mode.
        prompts: At least one; token ids, each at least one and at most `decoder.max_length`.
        strategy: How to decode; all but early_exit give the full model's own output.
        settings: Budget, end of sequence, sampling, and what the strategy needs.
        generators: Source of randomness of each prompt, on the decoder's device; needed when temperature > 0.

    Raises:
        ConfigError: A prompt, a setting or a combination cannot be used with this model.
    """

    def __init__(
        self,
        decoder: ExitableDecoder,
        prompts: Sequence[Sequence[int]],
        *,
        strategy: Strategy,
        settings: DecodingSettings,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        check_choice("strategy", strategy, STRATEGIES)
        check_settings(strategy, settings, decoder)
        _check_request(decoder, prompts, settings, generators)
        never_drafts = settings.draft_policy == "off" and STRATEGIES[strategy].lossless
        self._entry = STRATEGIES["autoregressive" if never_drafts else strategy]
        self._decoder, self._settings = decoder, settings
        costs = _NO_DRAFTS
        if self._entry.costs is not None:
            costs = settings.costs or self._entry.costs(decoder, settings)
        policy = POLICIES["off" if self._entry.costs is None else settings.draft_policy]
        # All rows share one clock when greedy. When sampling, what a seed gives depends on no other row.
        shared_pace = Pace(costs, by_clock=True) if settings.sampling.greedy else None
        self._rows = [
            SequenceState(
                index=index,
                prompt=list(prompt),
                room=decoder.max_length - len(prompt),
                settings=settings,
                policy=policy(settings.num_draft_tokens or 0, costs),
                pace=shared_pace or Pace(costs, by_clock=False),
                generator=None if generators is None else generators[index],
            )
            for index, prompt in enumerate(prompts)
        ]
        self._started_at = perf_counter()

    def __iter__(self) -> Iterator[tuple[int, Step]]:
        """For each round and each prompt still in it, yield the prompt's index and what was settled."""
        self._started_at = perf_counter()
        for row in self._rows:
            row.end_without_room()
        if not (rows := [row for row in self._rows if row.stop_reason is None]):
            return
        capacity = max(len(row.prompt) + min(row.remaining, _RESERVE) for row in rows)
        drafter = self._entry.new_drafter(self._decoder, self._settings, len(rows), capacity)
        confidence = any(row.policy.wants_confidence for row in rows)
        sampling = self._settings.sampling
        rule = GreedyRule(sampling, confidence=confidence) if sampling.greedy else SamplingRule(sampling)
        loop = _Loop(drafter, rule)
        with torch.no_grad():
            done = loop.prefill(rows)
        yield from _settle(rows, done)
        while still := [i for i, row in enumerate(rows) if row.stop_reason is None]:
            with torch.no_grad():
                if len(still) < len(rows):
                    drafter.keep_rows(still)
                    rows = [rows[i] for i in still]
                done = loop.round(rows)
            yield from _settle(rows, done)
            if self._settings.fall_back:
                _watch(rows, done)
                if all(row.pace.gave_up for row in rows):
                    drafter.end_drafting()

    def results(self) -> list[DecodingResult]:
        """What was decoded so far for each prompt; one that has not ended counts as interrupted."""
        return [row.result(started_at=self._started_at) for row in self._rows]


class _Round(NamedTuple):
    """What a round found for each row, when it ended (on `perf_counter`'s clock), and how long its two parts took."""

    steps: list[Step]
    ended_at: float
    draft_seconds: float
    verify_seconds: float


class _Loop(NamedTuple):
    """A prefill, then rounds of draft and verify."""

    drafter: FullModel
    rule: ChoiceRule

    def prefill(self, rows: Sequence[SequenceState]) -> _Round:
        """Run all prompts through the model, padded to one length; each yields its first new token."""
        lengths = [len(row.prompt) for row in rows]
        padded = [row.prompt + [0] * (max(lengths) - len(row.prompt)) for row in rows]
        tokens_BT = torch.tensor(padded, device=self.drafter.decoder.device)
        nothing: list[list[int]] = [[] for _ in rows]
        chosen = self.rule.verify(self.drafter.prefill(tokens_BT, lengths), rows, nothing)
        return _Round([Step([token]) for _, token in chosen], perf_counter(), 0.0, 0.0)

    def round(self, rows: Sequence[SequenceState]) -> _Round:
        """Draft for every row until none wants more, then verify all at once.

        Rows that draft less than others are padded with tokens that are neither verified nor kept.
        """
        started_at = perf_counter()
        limits = [row.draft_limit() if row.pace.drafts() else 0 for row in rows]
        drafts: list[list[int]] = [[] for _ in rows]
        live = [limit > 0 for limit in limits]
        columns = [torch.tensor([row.tokens[-1] for row in rows], device=self.drafter.decoder.device)]
        while any(live):
            drafted = self.rule.draft(self.drafter.draft(columns[-1]), rows, drafts, live)
            columns.append(drafted.tokens_B)
            for i, row in enumerate(rows):
                if live[i]:
                    drafts[i].append(drafted.tokens[i])
                    live[i] = (
                        len(drafts[i]) < limits[i]
                        and drafts[i][-1] not in row.settings.eos_token_ids  # nothing comes after the end
                        and row.policy.goes_on(drafted.confidences[i] if drafted.confidences else 1.0)
                    )
        drafted_at = perf_counter()
        outcomes = self.rule.verify(self.drafter.verify(torch.stack(columns, dim=1)), rows, drafts)
        self.drafter.settle([row.length + 1 + kept for row, (kept, _) in zip(rows, outcomes, strict=True)])
        ended_at = perf_counter()
        steps = [
            Step([*proposed[:kept], token], kept, tuple(proposed[kept:]))
            for proposed, (kept, token) in zip(drafts, outcomes, strict=True)
        ]
        for row, step in zip(rows, steps, strict=True):
            row.policy.observe(drafted=step.drafted, accepted=step.accepted)
        return _Round(steps, ended_at, drafted_at - started_at, ended_at - drafted_at)


def _settle(rows: Sequence[SequenceState], done: _Round) -> Iterator[tuple[int, Step]]:
    """Let each row take its step just before the caller sees it, so that a caller who stops has seen all of them."""
    for row, step in zip(rows, done.steps, strict=True):
        yield row.index, row.settle(step, at=done.ended_at)


def _watch(rows: Sequence[SequenceState], done: _Round) -> None:
    """Let each pace see the round, and note for which rows drafting ends with it."""
    for pace in dict.fromkeys(row.pace for row in rows):
        own = [row for row in rows if row.pace is pace]
        had_given_up = pace.gave_up
        pace.observe(
            drafted=sum(row.steps[-1].drafted for row in own) / len(own),
            settled=sum(len(row.steps[-1].tokens) for row in own) / len(own),
            draft_seconds=done.draft_seconds,
            verify_seconds=done.verify_seconds,
        )
        if pace.gave_up and not had_given_up:
            for row in own:
                row.fell_back_after = len(row.tokens)


def _check_request(
    decoder: ExitableDecoder,
    prompts: Sequence[Sequence[int]],
    settings: DecodingSettings,
    generators: Sequence[torch.Generator] | None,
) -> None:
    """Refuse prompts the model cannot take, while they are plain integers and checking waits for no device."""
    if not prompts:
        raise ConfigError("prompts", got=[], allowed="at least one prompt")
    for prompt in prompts:
        if not prompt:
            raise ConfigError("prompt_tokens", got=[], allowed="at least one token", fix="start from a BOS token")
        if len(prompt) > decoder.max_length:
            allowed = f"at most {decoder.max_length} tokens, the model's context"
            raise ConfigError("prompt_tokens", got=f"{len(prompt)} tokens", allowed=allowed)
    for field, tokens in (
        *(("prompt_tokens", prompt) for prompt in prompts),
        ("eos_token_ids", settings.eos_token_ids),
    ):
        for token in {min(tokens, default=0), max(tokens, default=0)}:
            check_range(field, token, low=0, high=decoder.vocab_size - 1, fix="use the model's own tokenizer")
    if not settings.sampling.greedy and len(generators or ()) != len(prompts):
        allowed = f"one torch.Generator on {decoder.device} for each prompt when temperature > 0"
        raise ConfigError("generators", got=generators, allowed=allowed)
