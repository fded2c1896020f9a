"""What it would cost and save to answer each question at the first exit that is sure enough of its choice.

This is lossy: what leaves early is not what the full model would have chosen. Every exit's answer is known from one
pass, so that all thresholds are judged without running the model again. Tested by test_confident_exits.py.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from app.errors import ConfigError
from app.evaluation.evaluate import Work
from app.evaluation.likelihood_tasks import likeliest, rankings
from app.evaluation.records import Record
from app.evaluation.task import ChoiceExample, ChoiceTask
from app.exits.confident_exit import ConfidentExit, Way
from app.intervals import share_interval


class Answer(NamedTuple):
    """What an exit says to a question: what the metric ranks the choices by, which is highest, and which is right."""

    values: tuple[float, ...]
    choice: int
    right: int

    def confidence(self, temperature: float) -> float:
        """The probability of its choice among all, by the softmax of the values over the temperature."""
        return 1 / math.fsum(math.exp((value - self.values[self.choice]) / temperature) for value in self.values)


class _Left(NamedTuple):
    """How one question was answered."""

    is_right: bool
    is_same: bool
    blocks: int
    heads: int


class _Exits(NamedTuple):
    """The exits that were measured, ascending, and how many blocks each has of its own."""

    layers: tuple[int, ...]
    own_blocks: tuple[int, ...]

    def leave(self, answers: Sequence[Answer], threshold: float, temperatures: Sequence[float]) -> _Left:
        """Take the answer of the first exit that is surer than the threshold, or else of the last one."""
        sure = (
            index
            for index, (answer, temperature) in enumerate(zip(answers, temperatures, strict=True))
            if answer.confidence(temperature) > threshold
        )
        at = next(sure, len(self.layers) - 1)
        blocks = self.layers[at] + sum(self.own_blocks[: at + 1])
        return self._left(answers, at, blocks=blocks, heads=at + 1)

    def only(self, answers: Sequence[Answer], at: int) -> _Left:
        """Take the answer of one exit, and ask no other."""
        return self._left(answers, at, blocks=self.layers[at] + self.own_blocks[at], heads=1)

    def _left(self, answers: Sequence[Answer], at: int, *, blocks: int, heads: int) -> _Left:
        choice = answers[at].choice
        return _Left(choice == answers[at].right, choice == answers[-1].choice, blocks, heads)


def check_thresholds(thresholds: Sequence[float]) -> list[float]:
    """The thresholds in ascending order, each once; ConfigError unless there is one, and all are from 0 to below 1."""
    if not thresholds or not all(0 <= each < 1 for each in thresholds):
        raise ConfigError("exit_thresholds", got=list(thresholds), allowed="one or several of [0, 1)")
    return sorted(set(thresholds))


def confident_exits(
    work: Iterable[Work],
    records: Mapping[tuple[str, int], Record],
    thresholds: Sequence[float],
    *,
    own_blocks: Mapping[int, int],
) -> list[ConfidentExit]:
    """Judge every exit and threshold on each task of multiple choice.

    An exit that was not trained as one is surer than it is right, and each exit by another scale. So confidence is that
    of the choices' scores over a temperature of the exit (`temperature_of`). Whoever fits it, or takes the best of
    several thresholds, on the very questions that are judged overstates what is gained. So the questions are cut in two
    halves by chance, and each is judged with the temperatures of the other one. In way `held_out` it also has the other
    one's threshold: the lowest with which that half has no fewer right answers than at the deepest exit.

    Args:
        work: The examples.
        records: What was found out about them, by task and row.
        thresholds: From `check_thresholds`.
        own_blocks: By exit layer, how many blocks each measured exit has of its own.
    """
    exits = _Exits(*zip(*sorted(own_blocks.items()), strict=True))
    found = []
    for task, _, items in work:
        if not isinstance(task, ChoiceTask):
            continue
        scored = [(item.example, records[task.name, item.row]) for item in items]
        answers = [
            answers_of(example, record, exits.layers, metric=task.metric)
            for example, record in scored
            if isinstance(example, ChoiceExample) and record.scores
        ]
        if answers:
            found += _ways(task, answers, thresholds, exits)
    return found


def _ways(
    task: ChoiceTask, answers: Sequence[Sequence[Answer]], thresholds: Sequence[float], exits: _Exits
) -> list[ConfidentExit]:
    def judged(
        left: Sequence[_Left], way: Way, *, exit_layer: int | None = None, threshold: float | None = None
    ) -> ConfidentExit:
        right, same, blocks, heads = (math.fsum(each) / len(left) for each in zip(*left, strict=True))
        low, high = share_interval(right, len(left))
        settings = (task.name, task.metric, way, exit_layer, threshold, len(left))
        return ConfidentExit(*settings, right, low, high, same, blocks, heads)

    found = [
        judged([exits.only(each, at) for each in answers], "exit", exit_layer=exit_layer)
        for at, exit_layer in enumerate(exits.layers)
    ]
    if len(answers) < 2:
        return found
    halves = _halves(answers)
    tuned = [[temperature_of(of_exit) for of_exit in zip(*half, strict=True)] for half in halves]
    chosen = [_lowest_without_loss(half, thresholds, exits, own) for half, own in zip(halves, tuned, strict=True)]
    for threshold in thresholds:
        left = [
            exits.leave(each, threshold, other)
            for half, other in zip(halves, reversed(tuned), strict=True)
            for each in half
        ]
        found.append(judged(left, "threshold", threshold=threshold))
    left = [
        exits.leave(each, threshold, other)
        for half, threshold, other in zip(halves, reversed(chosen), reversed(tuned), strict=True)
        for each in half
    ]
    return [*found, judged(left, "held_out")]


def answers_of(
    example: ChoiceExample, record: Record, exit_layers: Sequence[int], *, metric: str
) -> tuple[Answer, ...]:
    """The answer of each exit to one question."""
    found = []
    for exit_layer in exit_layers:
        values = rankings(example, record.detail["log_likelihoods"][str(exit_layer)])[metric]
        found.append(Answer(tuple(values), likeliest(values), example.answer))
    return tuple(found)


def temperature_of(answers: Sequence[Answer]) -> float:
    """The temperature, from 1e-4 to 1e4, at which the softmax gives the right choices the highest likelihood.

    The slope of the loss over the inverse of the temperature rises with it, so its zero is found by halving.
    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), section 4.2.
    """
    low, high = -4.0, 4.0  # of the inverse's decimal logarithm
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if _slope(answers, 10**middle) > 0 else (middle, high)
    return float(10 ** -((low + high) / 2))


def _slope(answers: Sequence[Answer], inverse: float) -> float:
    """The slope of the cross entropy of the right choices over the inverse of the temperature."""
    slopes = []
    for answer in answers:
        weights = [math.exp(inverse * (value - answer.values[answer.choice])) for value in answer.values]
        mean = math.fsum(weight * value for weight, value in zip(weights, answer.values, strict=True))
        slopes.append(mean / math.fsum(weights) - answer.values[answer.right])
    return math.fsum(slopes)


def _halves(answers: Sequence[Sequence[Answer]]) -> tuple[list[Sequence[Answer]], list[Sequence[Answer]]]:
    """The questions in two halves drawn by chance, the same at every call."""
    shuffled = list(answers)
    random.Random(0).shuffle(shuffled)
    return shuffled[::2], shuffled[1::2]


def _lowest_without_loss(
    answers: Sequence[Sequence[Answer]], thresholds: Sequence[float], exits: _Exits, temperatures: Sequence[float]
) -> float:
    """The lowest threshold with as many right answers as the deepest exit, or 1, which nothing is above."""
    needed = sum(each[-1].choice == each[-1].right for each in answers)
    good = (
        threshold
        for threshold in thresholds
        if sum(exits.leave(each, threshold, temperatures).is_right for each in answers) >= needed
    )
    return next(good, 1.0)
