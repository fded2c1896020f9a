"""The recipe of a run as numbers: what it drops and unembeds on average, and which of the paper's rules it breaks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from app.layerskip.distillation import RecipeLoss
from app.layerskip.exit_curricula import ExitCurriculum, exits_on
from app.layerskip.exit_weights import ExitWeights, normalised_exit_weights
from app.layerskip.schedules import DepthScale, TimeScale, dropout_rates, time_scale

_PAPER = "arXiv 2404.16710"
_SCRATCH_LR = 8e-4  # learning rate of the paper's models trained from scratch with layer dropout
# Tokens: the paper's runs below the first number have e_scale 1.0, those above the second have 0.2 or less.
_SMALL_BUDGET, _LARGE_BUDGET = 5.3e9, 26e9
_TINY_BUDGET = 5e7  # tokens
_OFTEN = 0.01  # share of micro-batches
_GRADUAL_SAMPLES = 1000  # steps at which the gradual curriculum is looked at


class Departure(NamedTuple):
    """A rule that a recipe breaks: the path of the setting, what it is and what the rule says, and who says so."""

    field: str
    message: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The numbers of a run's configuration, with the names of `LayerDropoutCurriculum` and `EarlyExitCurriculum`."""

    num_layers: int
    from_scratch: bool  # whether the run starts from random weights
    batch_size: int  # rows of a micro-batch on one device
    seq_len: int  # tokens a row
    accumulate: int = 1  # micro-batches a step
    world_size: int = 1  # number of devices
    max_steps: int | None = None  # T, or None if the run has no fixed length
    learning_rate: float = 0.0  # the peak learning rate
    small_weights: bool = False  # whether weights have 16 bits and no float32 copy
    max_dropout_rate: float = 0.0
    depth_scale: DepthScale = "exponential"
    time_scale: TimeScale = "constant"
    curriculum: ExitCurriculum = "none"
    rotation_interval: int = 8
    early_exit_scale: float = 0.2
    exit_weights: ExitWeights = "quadratic"
    always_on_last: bool = True
    exit_layers: tuple[int, ...] = ()
    loss: RecipeLoss = "cross_entropy"

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len * self.accumulate * self.world_size

    @property
    def tokens(self) -> int | None:
        return None if self.max_steps is None else self.tokens_per_step * self.max_steps

    @cached_property
    def mean_dropout_rates(self) -> tuple[float, ...]:
        """The mean over all steps of p(l, t), for every block."""
        steps = range(self.max_steps or 1)
        mean = sum(time_scale(step, total_steps=self.max_steps, kind=self.time_scale) for step in steps) / len(steps)
        return tuple(mean * rate for rate in self.last_dropout_rates)

    @property
    def last_dropout_rates(self) -> tuple[float, ...]:
        """p(l, t) of every block where S(t) = 1."""
        return dropout_rates(
            0, num_layers=self.num_layers, max_dropout_rate=self.max_dropout_rate, depth=self.depth_scale
        )

    @cached_property
    def exits_by_step(self) -> tuple[int, ...]:
        every = max(1, (self.max_steps or 1) // _GRADUAL_SAMPLES)
        periods = {"rotational": range(self.rotation_interval), "gradual": range(0, self.max_steps or 1, every)}
        return tuple(self._num_exits(step) for step in periods.get(self.curriculum, range(1)))

    @property
    def mean_exits(self) -> float:
        return sum(self.exits_by_step) / len(self.exits_by_step)

    def _num_exits(self, step: int) -> int:
        exits = exits_on(
            step,
            curriculum=self.curriculum,
            num_layers=self.num_layers,
            rotation_interval=self.rotation_interval,
            always_on_last=self.always_on_last,
            total_steps=self.max_steps,
            exit_layers=self.exit_layers,
        )
        kind, scale = self.exit_weights, self.early_exit_scale
        return len(normalised_exit_weights(exits, num_layers=self.num_layers, early_exit_scale=scale, kind=kind))


def find_departures(recipe: Recipe) -> list[Departure]:
    """Return the rules that the recipe breaks, each with the setting that would keep it. `fit` runs it all the same."""
    found: list[Departure] = []
    if recipe.max_dropout_rate:
        found += _dropout_departures(recipe)
    if recipe.curriculum != "none" and recipe.early_exit_scale:
        found += _exit_departures(recipe)
    if recipe.small_weights:
        message = (
            "16-bit weights without a float32 copy: an update below 1/256 of a weight is rounded away, as most are"
            f" at a learning rate of {recipe.learning_rate:g}; bf16-mixed keeps float32 weights"
        )
        source = "arXiv 1710.03740 section 3.1 (master copy of weights)"
        found.append(Departure("trainer.precision", message, source))
    return found


def _dropout_departures(recipe: Recipe) -> Iterator[Departure]:
    section = f"{_PAPER} section 4.1.1"
    rule, wanted = "a pretrained model is trained at one rate, S(t) = 1", "constant"
    if recipe.from_scratch:
        rule, wanted = "from scratch the rate rises with the steps, S(t) = 2^(t/(T-1)) - 1", "exponential"
    if recipe.time_scale != wanted:
        yield Departure("layer_dropout.time_scale", f"{recipe.time_scale}: {rule}: {wanted}", section)
    if recipe.from_scratch and recipe.learning_rate < _SCRATCH_LR:
        rule = "layer dropout from scratch wants a higher one; it was raised from 4e-4 (1.5B) and 3e-4 (7B) to 8e-4"
        source = f"{_PAPER} section 5, table of hyperparameters"
        yield Departure("model.optimizer.lr", f"{recipe.learning_rate:g}: {rule}", source)
    deepest = max(recipe.last_dropout_rates)
    if (chance := deepest**recipe.batch_size) >= _OFTEN:
        message = (
            f"{recipe.batch_size}: a block of rate {deepest:g} is dropped for all rows in {chance:.0%} of"
            " micro-batches, which then do not train it; take more rows"
        )
        yield Departure("data.batch_size", message, section)


def _exit_departures(recipe: Recipe) -> Iterator[Departure]:
    scale, tokens, section = recipe.early_exit_scale, recipe.tokens, f"{_PAPER} section 5"
    if recipe.loss != "cross_entropy":
        message = f"{recipe.loss}: the paper's early exits learn the text, cross_entropy"
        yield Departure("early_exit.loss", message, f"{_PAPER} section 4.1.2")
    if tokens is None:
        return
    if tokens < _TINY_BUDGET and recipe.exit_weights == "quadratic":
        message = f"quadratic for {tokens:.2g} tokens: early exits stay too weak to draft; uniform suits few tokens"
        yield Departure("early_exit.exit_weights", message, "method card (app/layerskip/README.md), when not to use it")
    if tokens <= _SMALL_BUDGET and scale < 1.0:
        message = f"{scale:g} for {tokens:.2g} tokens: runs of 5.2 billion tokens and fewer have 1.0"
        yield Departure("early_exit.early_exit_scale", message, section)
    if tokens >= _LARGE_BUDGET and scale > 0.2:
        message = f"{scale:g} for {tokens:.2g} tokens: runs of 26 billion tokens and more have 0.1 to 0.2"
        yield Departure("early_exit.early_exit_scale", message, section)
