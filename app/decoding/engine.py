"""The one way to decode: check, draft, verify, stop, count and time.

Shape legend: `B` sequences, `T` prompt tokens, `S` verified positions (drafts + 1).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import torch

from app.decoding.acceptance import GreedyRule, SamplingRule
from app.decoding.cost_model import CostModel
from app.decoding.draft_policy import POLICIES, Pace
from app.decoding.dynamic_rounds import DynamicRounds, Round, paces_of
from app.decoding.exit_choice import ExitChoice
from app.decoding.n_grams import NGramIndex
from app.decoding.result import DecodingResult, Step
from app.decoding.rows import SequenceState
from app.decoding.settings import DecodingSettings, Ends
from app.decoding.static_rounds import StaticRounds
from app.decoding.strategies import STRATEGIES, Strategy, check_request, check_settings
from app.errors import check_choice
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
    return Decoding(decoder, prompts, strategy=strategy, settings=settings, generators=generators).finish(on_step)


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
        ends: Budget and stop condition of each prompt, where they are not those of the settings for all.

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
        ends: Sequence[Ends] | None = None,
    ) -> None:
        check_choice("strategy", strategy, STRATEGIES)
        check_settings(strategy, settings, decoder)
        check_request(decoder, prompts, settings, generators)
        never_drafts = settings.draft_policy == "off" and STRATEGIES[strategy].lossless
        self._entry = STRATEGIES["autoregressive" if never_drafts else strategy]
        self._decoder, self._settings = decoder, settings
        costs = _NO_DRAFTS
        if self._entry.costs is not None:
            costs = settings.costs or self._entry.costs(decoder, settings)
        policy = POLICIES[settings.policy if self._entry.has_drafter else "off"]
        match = None if self._entry.costs is None else settings.n_gram_match
        by_exit = _costs_by_exit(decoder, settings, costs) if settings.draft_policy == "dynamic" else {}
        # All rows share their clocks when greedy. When sampling, what a seed gives depends on no other row.
        shared = self._new_judges(costs, by_exit) if settings.sampling.greedy else None
        self._rows = []
        for index, prompt in enumerate(prompts):
            pace, n_gram_pace, choice = shared or self._new_judges(costs, by_exit)
            most = settings.num_draft_tokens or 0
            self._rows.append(
                SequenceState(
                    index=index,
                    prompt=list(prompt),
                    room=decoder.max_length - len(prompt),
                    settings=settings if ends is None else replace(settings, **ends[index]._asdict()),
                    policy=policy(most, costs),
                    pace=pace,
                    choice=choice,
                    policy_by_exit={exit_layer: policy(most, own) for exit_layer, own in by_exit.items()},
                    n_grams=None if match is None else NGramIndex(prompt, match=match),
                    n_gram_pace=n_gram_pace,
                    generator=None if generators is None else generators[index],
                )
            )
        self._started_at = perf_counter()
        self._open: list[SequenceState] = []  # the rows of the next round
        self._rounds: DynamicRounds | StaticRounds | None = None
        self._joining: list[Decoding] = []
        self._num_indices = len(self._rows)

    def _new_judges(self, costs: CostModel, by_exit: Mapping[int, CostModel]) -> tuple[Pace, Pace, ExitChoice | None]:
        """Make the judges of the drafter's drafts, of n-grams and of exits.

        The first two are one and the same where only n-grams draft.
        """
        by_clock = self._settings.sampling.greedy
        of_n_grams = Pace(costs.of_n_grams(), by_clock=by_clock)
        of_drafter = Pace(costs, by_clock=by_clock) if self._entry.has_drafter else of_n_grams
        return of_drafter, of_n_grams, ExitChoice(by_exit, by_clock=by_clock) if by_exit else None

    def __iter__(self) -> Iterator[tuple[int, Step]]:
        """For each round and each prompt still in it, yield the prompt's index and what was settled."""
        yield from self.begin()
        while rows := self._rows_of_next_round():
            assert self._rounds is not None
            with torch.no_grad():
                done = self._rounds.round(rows)
            yield from _settle(rows, done)
            if self._settings.fall_back:
                _watch(rows, done)
                if all(row.pace.gave_up for row in rows) and not self._joining:
                    self._rounds.end_drafting()
        if self._rounds is not None:
            self._rounds.end()
            self._rounds = None

    def begin(self) -> Iterator[tuple[int, Step]]:
        """Run the prompts, and yield what that settles: the first part of an iteration, for a decoding that joins."""
        self._started_at = perf_counter()
        for row in self._rows:
            row.end_without_room()
        self._open = [row for row in self._rows if row.stop_reason is None]
        if not self._open:
            return
        capacity = max(len(row.prompt) + min(row.remaining, _RESERVE) for row in self._open)
        with torch.no_grad():
            self._rounds = self._new_rounds(self._open, capacity)
            done = self._rounds.prefill(self._open)
        yield from _settle(self._open, done)

    @property
    def takes_prompts(self) -> bool:
        """Whether others can `join`, which static rounds and drafters that keep more than a cache do not allow."""
        return self._rounds is not None and self._rounds.takes_rows

    def join(self, other: "Decoding") -> range:
        """Let another decoding's prompts run along from the next round on; each comes out as it would alone.

        Call it while iterating, where `takes_prompts`. The other has gone through `begin`, and is of the same decoder,
        strategy and settings, but for budgets and stop conditions. It goes on to give its own `results`.

        Returns:
            The indices under which this decoding yields what is settled for them.
        """
        assert self.takes_prompts
        indices = range(self._num_indices, self._num_indices + len(other._rows))
        for row, index in zip(other._rows, indices, strict=True):
            row.index = index
        self._joining.append(other)
        self._num_indices = indices.stop
        return indices

    def _rows_of_next_round(self) -> Sequence[SequenceState]:
        """The rows that have not ended, with those of decodings that joined."""
        self._drop_ended()
        for other in self._joining:
            other._drop_ended()
            if self._open and other._open:
                assert isinstance(self._rounds, DynamicRounds)
                assert isinstance(other._rounds, DynamicRounds)
                self._rounds.join(other._rounds)
            elif other._open:
                self._rounds = other._rounds
            self._open += other._open
        self._joining = []
        return self._open

    def _drop_ended(self) -> None:
        still = [i for i, row in enumerate(self._open) if row.stop_reason is None]
        if 0 < len(still) < len(self._open):
            assert self._rounds is not None
            with torch.no_grad():
                self._rounds.keep_rows(still)
        self._open = [self._open[i] for i in still]

    def _new_rounds(self, rows: Sequence[SequenceState], capacity: int) -> DynamicRounds | StaticRounds:
        new_drafter, settings, sampling = self._entry.new_drafter, self._settings, self._settings.sampling
        if settings.engine == "static":
            return StaticRounds(self._decoder, settings, rows, new_drafter, capacity=capacity, clock=perf_counter)
        drafter = new_drafter(self._decoder, settings, len(rows), capacity)
        given = sampling, drafter.draft_ids, self._decoder.vocab_size
        confidence = any(row.policy.wants_confidence for row in rows)
        rule = GreedyRule(*given, confidence=confidence) if sampling.greedy else SamplingRule(*given)
        return DynamicRounds(drafter, rule, perf_counter)

    def finish(self, on_step: OnStep | None = None) -> list[DecodingResult]:
        """Decode to the end; see `decode_batch`."""
        try:
            for index, step in self:
                if on_step is not None:
                    on_step(index, step)
        except KeyboardInterrupt:
            raise DecodingInterrupted(self.results()) from None
        return self.results()

    def results(self) -> list[DecodingResult]:
        """What was decoded so far for each prompt; one that has not ended counts as interrupted."""
        return [self.result(index) for index in range(len(self._rows))]

    def result(self, index: int) -> DecodingResult:
        """The same of the prompt with this index."""
        return self._rows[index].result(started_at=self._started_at)


def _costs_by_exit(decoder: ExitableDecoder, settings: DecodingSettings, costs: CostModel) -> dict[int, CostModel]:
    """The costs of drafting from each exit that may draft, from those of `exit_layer`."""
    first, size = settings.exit_layer or 0, decoder.exit_block_size(settings.exit_layer or 0)
    return {
        exit_layer: costs.from_exit(
            later_by=exit_layer - first, own_by=(decoder.exit_block_size(exit_layer) - size) / decoder.block_size
        )
        for exit_layer in settings.candidate_exits
    }


def _settle(rows: Sequence[SequenceState], done: Round) -> Iterator[tuple[int, Step]]:
    """Let each row take its step just before the caller sees it, so that a caller who stops has seen all of them."""
    for row, step in zip(rows, done.steps, strict=True):
        yield row.index, row.settle(step, at=done.ended_at)


def _watch(rows: Sequence[SequenceState], done: Round) -> None:
    """Let each pace see the rounds that it judges, and note for which rows drafting ends with this one.

    All paces see rounds without drafts. Where the drafter drafted for some rows and n-grams for others, the time is the
    drafter's doing, and what n-grams settled would have been settled without it, too.
    """
    for pace in paces_of(rows):
        own = [row for row in rows if pace in (row.pace, row.n_gram_pace)]
        steps = [row.steps[-1] for row in own]
        by_drafter = any(step.drafted and not step.by_n_gram for step in steps)
        if any(step.drafted for step in steps) and by_drafter == (pace is own[0].n_gram_pace):
            continue
        had_given_up = pace.gave_up
        without = sum(len(step.tokens) if by_drafter and step.by_n_gram else 1 for step in steps)
        choice = own[0].choice if pace is own[0].pace else None
        pace.observe(
            drafted=sum(step.drafted for step in steps) / len(own),
            settled=sum(len(step.tokens) for step in steps) / without,
            draft_seconds=done.draft_seconds,
            verify_seconds=done.verify_seconds,
            costs=None if choice is None else choice.costs,
        )
        if pace.gave_up and not had_given_up:
            for row in own:
                if row.pace is pace:
                    row.fell_back_after = len(row.tokens)
