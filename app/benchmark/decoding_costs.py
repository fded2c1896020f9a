"""What the symbols of the cost model (`app.decoding.cost_model`) are worth on this machine, timed on a live decoder.

Shape legend: `B` sequences, `T` prompt tokens, `S` positions of a pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from statistics import fmean, linear_regression, median
from time import perf_counter
from typing import Any

import torch

from app.decoding.acceptance import GreedyRule
from app.decoding.cost_model import CostModel
from app.decoding.drafters import EarlyExitDrafter, FullModel
from app.decoding.engine import decode_batch
from app.decoding.settings import DecodingSettings
from app.errors import ConfigError, check_range
from app.protocols import ExitableDecoder

_TIMED_TOKENS = 8  # tokens of every decoding after its first one; more than one, since the first find cold caches

Clock = Callable[[], float]
Setting = tuple[int, int]  # exit_layer, num_draft_tokens


@dataclass(frozen=True, kw_only=True)
class DecodingCosts:
    """Costs of decoding steps at one batch size and context length."""

    block_seconds: float  # one block over one token of each sequence
    # H, in blocks: what a step costs beside its blocks, that is embedding, final norm, LM head and choosing.
    head: float
    draft_head: float  # H_d, the same of a drafted token
    # j, what a pass over several positions costs more than one over a single position, however many they are, as a
    # share of the latter.
    first_extra: float
    extra_token: float  # k, what each further position costs beside j, as the same share
    overhead: float  # what a draft-and-verify round costs beside its passes, in blocks

    @property
    def in_blocks(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "block_seconds"}

    def cost_model(self, *, num_layers: int, exit_layer: int, num_exit_blocks: float = 0.0) -> CostModel:
        return CostModel.self_speculative(
            num_layers=num_layers, exit_layer=exit_layer, num_exit_blocks=num_exit_blocks, **self.in_blocks
        )

    def of_exit(self, decoder: ExitableDecoder, exit_layer: int) -> CostModel:
        own = decoder.exit_block_size(exit_layer) / decoder.block_size
        return self.cost_model(num_layers=decoder.num_layers, exit_layer=exit_layer, num_exit_blocks=own)

    def two_pass(self, *, num_layers: int, draft_step: float) -> CostModel:
        """Return the cost model of drafts that share no computation with the verification."""
        shares = {name: value for name, value in self.in_blocks.items() if name != "draft_head"}
        return CostModel.two_pass(num_layers=num_layers, draft_step=draft_step, **shares)


def measure_decoding_costs(
    decoder: ExitableDecoder,
    *,
    batch_size: int = 1,
    context_length: int = 128,
    max_positions: int = 9,
    repeats: int = 5,
    clock: Clock = perf_counter,
) -> DecodingCosts:
    """Time steps, passes and rounds on a prompt of random tokens; each repeat times everything once, in turn.

    With t(E) the median seconds of a step of E blocks, p(S) of a pass of the full model over S positions, draft(E) of
    a drafted token, and round(E, d) of a draft-and-verify round:

        block_seconds = (t(L) - t(1)) / (L - 1)        what a step costs whatever its blocks cancels out
        H             = t(L) / block_seconds - L
        j, k            of the least squares line p(S)/p(1) - 1 = j + k (S-1), S > 1
        H_d           = mean over E of draft(E) / block_seconds - E - A
        overhead      = mean over (E, d) of round(E, d) / block_seconds - C(E, d)

    where A counts the blocks of an exit's own (`CostModel.self_speculative`), and C(E, d) is the cost model's round
    without overhead. Drafts are timed alone: the difference of two rounds, each many times as long as a draft's head,
    would be mostly noise. No cost is ever negative; where H_d would be, it is H, or as much less as the draft
    vocabulary has fewer rows.

    Args:
        decoder: In eval mode, with at least two blocks.
        context_length: Tokens of the prompt; fewer where the model's context is short.
        max_positions: Most positions of a pass, at least 3 and at most half the model's context.
        repeats: Measurements of each, at least 1; one more warms up.

    Raises:
        ConfigError: `max_positions` is out of range, or the model has a single block.
    """
    num_layers = decoder.num_layers
    if num_layers == 1:
        allowed, fix = (
            "at least two, to draft from some of them",
            "one block is decoded autoregressively: nothing to tune",
        )
        raise ConfigError("model", got="one block", allowed=allowed, fix=fix)
    check_range("max_positions", max_positions, low=3, high=decoder.max_length // 2)
    length = max(1, min(context_length, decoder.max_length - max_positions - _TIMED_TOKENS))
    generator = torch.Generator().manual_seed(0)
    prompts_BT = torch.randint(decoder.vocab_size, (batch_size, length), generator=generator)
    num_exit_blocks = {
        exit_layer: decoder.exit_block_size(exit_layer) / decoder.block_size for exit_layer in range(1, num_layers)
    }
    own = [exit_layer for exit_layer, number in num_exit_blocks.items() if number]
    exits = own[:2] or sorted({max(1, num_layers // 8), max(1, num_layers // 4)})  # where drafts are worth it
    return fit_decoding_costs(
        *_medians(_Timer(decoder, prompts_BT.tolist(), clock), exits, max_positions=max_positions, repeats=repeats),
        head_by_size=decoder.head_size / decoder.block_size,
        draft_share=decoder.draft_head_size / decoder.head_size,
        num_exit_blocks=num_exit_blocks,
    )


def median_costs(costs: Sequence[DecodingCosts]) -> DecodingCosts:
    """Take the median of each figure over several measurements, so that a busy moment of the machine decides none."""
    return DecodingCosts(**{name: median(getattr(each, name) for each in costs) for name in vars(costs[0])})


def costs_line(costs: DecodingCosts) -> str:
    """Write the costs in one line; what `fit_decoding_costs` clipped to 0 is called too small to measure, not free."""

    def figure(value: float, style: str) -> str:
        return style.format(value) if value else "too small to measure"

    return (
        f"a block takes {costs.block_seconds * 1e6:.0f} us at one token; in blocks: the rest of a step (H)"
        f" {figure(costs.head, '{:.2f}')}, of a draft (H_d) {figure(costs.draft_head, '{:.2f}')}, a round's overhead"
        f" {figure(costs.overhead, '{:.2f}')}; several positions add to a pass (j)"
        f" {figure(costs.first_extra, '{:.1%} of it')}, each of them (k) {figure(costs.extra_token, '{:.1%}')}"
    )


def fit_decoding_costs(
    steps: Mapping[int, float],
    passes: Mapping[int, float],
    drafts: Mapping[int, float],
    rounds: Mapping[Setting, float],
    *,
    head_by_size: float,
    draft_share: float = 1.0,
    num_exit_blocks: Mapping[int, float] | None = None,
) -> DecodingCosts:
    """Solve the equations of `measure_decoding_costs`; no cost comes out negative, whatever the noise.

    Args:
        steps: Blocks run -> seconds of a decoding step; of the first exit and of the full model.
        passes: Positions -> seconds of a pass of the full model; of 1, 2 and 3 positions at least.
        drafts: Exit layer -> seconds of a drafted token.
        rounds: (exit_layer, num_draft_tokens) -> seconds of a draft-and-verify round, of the same exits.
        head_by_size: H by parameter counts, for times so noisy that blocks seem to cost nothing.
        draft_share: Share of the LM head's rows that drafts use.
        num_exit_blocks: Exit layer -> A, by default 0.
    """
    own = num_exit_blocks or {}
    num_layers, first = max(steps), min(steps)
    full = steps[num_layers]
    block = min((full - steps[first]) / (num_layers - first), full / num_layers)
    if block <= 0.0:
        block = full / (num_layers + head_by_size)
    head = full / block - num_layers
    several = {positions - 1: seconds / passes[1] - 1.0 for positions, seconds in passes.items() if positions > 1}
    first_extra, extra_token = fitted_line(several)
    draft_head = fmean(
        seconds / block - exit_layer - own.get(exit_layer, 0.0) for exit_layer, seconds in drafts.items()
    )
    costs = DecodingCosts(
        block_seconds=block,
        head=head,
        # A draft runs the head too, so it cannot cost nothing.
        draft_head=draft_head if draft_head > 0.0 else head * draft_share,
        first_extra=first_extra,
        extra_token=extra_token,
        overhead=0.0,
    )
    beyond = [
        seconds / block
        - costs.cost_model(
            num_layers=num_layers, exit_layer=exit_layer, num_exit_blocks=own.get(exit_layer, 0.0)
        ).round_cost(num_draft_tokens)
        for (exit_layer, num_draft_tokens), seconds in rounds.items()
    ]
    return replace(costs, overhead=max(0.0, fmean(beyond)))


def fitted_line(shares: Mapping[int, float]) -> tuple[float, float]:
    """Fit start and slope by least squares; through 0 where the line would start below, level where it would fall."""
    further, heights = list(shares), list(shares.values())
    slope, start = linear_regression(further, heights)
    if slope <= 0.0:
        return max(0.0, fmean(heights)), 0.0
    if start >= 0.0:
        return start, slope
    return 0.0, max(0.0, linear_regression(further, heights, proportional=True).slope)


class _Timer:
    """Times what the engine does, on the same prompts each time."""

    def __init__(self, decoder: ExitableDecoder, prompts: list[list[int]], clock: Clock) -> None:
        self._decoder, self._prompts, self._clock = decoder, prompts, clock
        self.num_layers = decoder.num_layers

    def rounds(self, exit_layer: int, num_draft_tokens: int) -> list[float]:
        """Time each round after the prompt's pass in which the whole batch took part, in seconds.

        Without drafts a round is a decoding step that runs `exit_layer` blocks.
        """
        is_full = exit_layer == self._decoder.num_layers
        times: list[list[float]] = [[] for _ in self._prompts]
        decode_batch(
            self._decoder,
            self._prompts,
            strategy="self_speculative" if num_draft_tokens else "autoregressive" if is_full else "early_exit",
            settings=DecodingSettings(
                max_new_tokens=_TIMED_TOKENS + 1 + num_draft_tokens,  # never so short that a draft is cut
                stop=lambda _, tokens, __: len(tokens) if len(tokens) > _TIMED_TOKENS else None,
                exit_layer=None if is_full else exit_layer,
                num_draft_tokens=num_draft_tokens or None,
            ),
            on_step=lambda row, _: times[row].append(self._clock()),
        )
        together = min(map(len, times))
        return [after - before for before, after in pairwise(times[0][:together])]

    @torch.no_grad()
    def drafts(self, exit_layer: int) -> list[float]:
        """Time each of some tokens that an exit drafts after the prompt as in a greedy round, in seconds."""
        lengths = [len(prompt) for prompt in self._prompts]
        tokens_BT = torch.tensor(self._prompts, device=self._decoder.device)
        settings = DecodingSettings(max_new_tokens=_TIMED_TOKENS, exit_layer=exit_layer)
        drafter = EarlyExitDrafter(self._decoder, settings, len(lengths), capacity=lengths[0] + _TIMED_TOKENS)
        rule = GreedyRule(settings.sampling, drafter.draft_ids, self._decoder.vocab_size, confidence=False)
        tokens_B = drafter.prefill(tokens_BT, lengths)[:, 0].argmax(-1)
        tokens_B.tolist()  # waits for the device
        seconds = []
        for _ in range(_TIMED_TOKENS):
            started = self._clock()
            tokens_B = rule.draft(drafter.draft(tokens_B), [], [], []).tokens_B
            seconds.append(self._clock() - started)
        return seconds

    @torch.no_grad()
    def passes(self, max_positions: int) -> list[float]:
        """Time one pass of the full model over 1, 2, ... `max_positions` positions after the prompt, in seconds."""
        lengths = [len(prompt) for prompt in self._prompts]
        tokens_BT = torch.tensor(self._prompts, device=self._decoder.device)
        model = FullModel(self._decoder, batch_size=len(lengths), capacity=lengths[0] + max_positions)
        model.prefill(tokens_BT, lengths).argmax(-1).tolist()
        seconds = []
        for positions in range(1, max_positions + 1):
            tokens_BS = tokens_BT[:, :1].expand(-1, positions)
            started = self._clock()
            model.verify(tokens_BS).max(-1).indices.tolist()  # as a round chooses and waits for the device
            seconds.append(self._clock() - started)
            model.settle(lengths)
        return seconds


def _medians(
    timer: _Timer, exits: Sequence[int], *, max_positions: int, repeats: int
) -> tuple[dict[int, float], dict[int, float], dict[int, float], dict[Setting, float]]:
    """Return the median seconds of steps, passes, drafts and rounds, as `fit_decoding_costs` takes them.

    Each repeat times everything once, so that a machine that becomes slower does so for all alike.
    """
    steps = [(1, 0), (timer.num_layers, 0)]
    rounds = [*product(exits, ((max_positions - 1) // 2, max_positions - 1))]
    timed: dict[Setting, list[float]] = {setting: [] for setting in (*steps, *rounds)}
    drafted: dict[int, list[float]] = {exit_layer: [] for exit_layer in exits}
    passed: list[list[float]] = []
    for repeat in range(repeats + 1):
        for setting, samples in timed.items():
            samples += timer.rounds(*setting)
        for exit_layer, samples in drafted.items():
            samples += timer.drafts(exit_layer)
        passed.append(timer.passes(max_positions))
        if repeat == 0:  # it warms up
            for samples in (*timed.values(), *drafted.values()):
                samples.clear()
            passed.clear()
    return (
        {exit_layer: median(timed[exit_layer, drafts]) for exit_layer, drafts in steps},
        dict(enumerate(map(median, zip(*passed, strict=True)), start=1)),
        {exit_layer: median(samples) for exit_layer, samples in drafted.items()},
        {setting: median(timed[setting]) for setting in rounds},
    )
