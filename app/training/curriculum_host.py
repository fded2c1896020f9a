"""What callbacks may set in a module that trains, and ask of it. Tested by test_curricula.py, test_agreement.py."""

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import FrameType
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule

from app.data_ranks import data_ranks
from app.errors import ConfigError, check_range
from app.layerskip.layer_dropout import KeptSamples, draw_kept_samples
from app.protocols import MicroBatchWork

_FIX = "one of them is enough; of the command line's, --{} leaves it to a callback of your own"
Value = TypeVar("Value")


class Dropout(NamedTuple):
    """Layer dropout of a micro-batch: p(l, t) of each block, and whether kept residuals are scaled by 1/(1 - p)."""

    rates: tuple[float, ...]
    rescale: bool = False


class Exits(NamedTuple):
    """Exits of a micro-batch: w(t, l) by exit layer, and whether early ones learn the full model's distribution."""

    weights: Mapping[int, float]
    distil: bool = False


class CurriculumHost(LightningModule):
    """Keeps what curricula set, and which callback set it. A fit in which none does is plain next-token training.

    Its members are those of LayerDropoutHost, EarlyExitHost, ExitMonitorHost and WorkHost in app.protocols.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self._num_layers = num_layers
        self._dropout = OwnedSetting(
            "dropout rates", Dropout((0.0,) * num_layers), fix=_FIX.format("layer_dropout.max_dropout_rate 0")
        )
        self._exits = OwnedSetting(
            "exit weights", Exits({num_layers: 1.0}), fix=_FIX.format("early_exit.curriculum none")
        )
        self._dropped_shares = self.dropout_rates
        self._monitored: set[int] = set()
        self._work_watchers: list[Callable[[MicroBatchWork], None]] = []

    @property
    def num_layers(self) -> int:
        return self._num_layers

    @property
    def dropout_rates(self) -> tuple[float, ...]:
        return self._dropout.value.rates

    @property
    def dropped_shares(self) -> tuple[float, ...]:
        return self._dropped_shares

    def set_dropout_rates(self, rates: Sequence[float], *, rescale: bool = False) -> None:
        """Use these rates from the next micro-batch on; ConfigError unless there is one in [0, 1) for each block."""
        if len(rates) != self.num_layers:
            raise ConfigError("set_dropout_rates", got=f"{len(rates)} rates", allowed=f"{self.num_layers}, one a block")
        for rate in rates:
            check_range("set_dropout_rates", rate, low=0, high=1, high_open=True)
        self._dropout.write(Dropout(tuple(rates), rescale))

    @property
    def exit_weights(self) -> Mapping[int, float]:
        return self._exits.value.weights

    def set_exit_weights(self, weights: Mapping[int, float], *, distil: bool = False) -> None:
        """Use these exits and weights, and for early exits KL if `distil`, from the next micro-batch on.

        ConfigError if an exit is not one of the model's, or the weights are negative or do not sum to 1.
        """
        for exit_layer, weight in weights.items():
            check_range("set_exit_weights", exit_layer, low=1, high=self.num_layers, fix="exits count blocks run")
            check_range("set_exit_weights", weight, low=0)
        if not math.isclose(total := sum(weights.values()), 1, abs_tol=1e-6):
            raise ConfigError("set_exit_weights", got=dict(weights), allowed=f"weights that sum to 1, not {total:g}")
        self._exits.write(Exits(dict(weights), distil))

    def monitor_exits(self, exit_layers: Sequence[int]) -> None:
        self._monitored.update(exit_layers)

    @property
    def monitored_exits(self) -> Collection[int]:
        return self._monitored

    def watch_work(self, watcher: Callable[[MicroBatchWork], None]) -> None:
        self._work_watchers.append(watcher)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._dropout.start_fit(self.trainer.callbacks)  # type: ignore[attr-defined]
            self._exits.start_fit(self.trainer.callbacks)  # type: ignore[attr-defined]

    def curricula_now(self) -> tuple[Dropout, Exits]:
        """Layer dropout and exits of the micro-batch that begins.

        ConfigError if two callbacks have set the same, or several devices would train without the full model.
        """
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        dropout, exits = self._dropout.start_micro_batch(callbacks), self._exits.start_micro_batch(callbacks)
        # Without the full model, the blocks above the highest exit have no gradient to reduce.
        if self.trainer.world_size > 1 and self.num_layers not in exits.weights:
            allowed = f"the full model, exit {self.num_layers}, among them on more than one device"
            raise ConfigError("set_exit_weights", got=dict(exits.weights), allowed=allowed)
        return dropout, exits

    def draw_kept(self, batch_size: int, batch_idx: int, *, seed: int) -> KeptSamples | None:
        """Draw the samples that each block keeps, on the CPU, and show the work to those who watch; None keeps all.

        Ranks that share weights call this together: whatever rows each has, all must know which blocks no rank needs,
        so they agree on the largest micro-batch among them. So do ranks whose work is watched, at any rates.
        """
        trainer, rates, watchers = self.trainer, self.dropout_rates, self._work_watchers
        (rank, num_replicas), largest, kept = data_ranks(trainer), batch_size, None
        if num_replicas > 1 and (watchers or (any(rates) and self.device_mesh is not None)):
            of_all_ranks = torch.tensor(batch_size, device=self.device)
            dist.all_reduce(of_all_ranks, op=dist.ReduceOp.MAX)
            largest = int(of_all_ranks)
        if any(rates):
            micro_step = batch_idx % trainer.accumulate_grad_batches
            kept = draw_kept_samples(
                rates,
                batch_size=batch_size,
                seed=seed,
                step=trainer.global_step,
                micro_batch=micro_step * num_replicas + rank,
                largest_batch=largest,
            )
        if watchers:
            samples = kept and tuple(tuple(of_block.tolist()) for of_block in kept.by_block)
            exits = tuple(sorted(self.exit_weights.items()))
            work = MicroBatchWork(batch_size, rates, samples, kept and kept.most, exits)
            for watch in watchers:
                watch(work)
        shares = (1 - len(of_block) / max(1, batch_size) for of_block in kept.by_block) if kept else rates
        self._dropped_shares = tuple(shares)
        return kept


class _Writer(NamedTuple):
    """What wrote a setting: its name in messages, and the identity of the callback; None for other code."""

    name: str
    callback_id: int | None

    def is_among(self, callbacks: Iterable[Callback]) -> bool:
        """Whether it can write in a fit with these callbacks; code outside of callbacks always can."""
        return self.callback_id is None or self.callback_id in map(id, callbacks)


class OwnedSetting(Generic[Value]):
    """A value that at most one callback may write in a step, so that no callback's value is ignored.

    The writer is found on the call stack, so that writing takes no extra argument. For the message, `name` is what is
    set, in the plural, and `fix` what to do about two writers.
    """

    def __init__(self, name: str, default: Value, *, fix: str) -> None:
        self.name, self.default, self.fix = name, default, fix
        self.value = default
        self._writers: list[_Writer] = []  # since the latest training micro-batch, in order
        self._latest: _Writer | None = None

    def write(self, value: Value) -> None:
        """Use `value` from the next micro-batch on."""
        self.value, self._latest = value, _writer(inspect.currentframe())
        if self._latest not in self._writers:
            self._writers.append(self._latest)

    def start_fit(self, callbacks: Iterable[Callback]) -> None:
        """Return to the default if a callback of an earlier fit wrote the value."""
        if self._latest is not None and not self._latest.is_among(callbacks):
            self.value = self.default

    def start_micro_batch(self, callbacks: Iterable[Callback]) -> Value:
        """The value to use. Raises ConfigError if two have written it since the last micro-batch, naming them."""
        writers = [writer.name for writer in self._writers if writer.is_among(callbacks)]
        self._writers = []
        if len(writers) > 1:
            allowed = f"one that sets the {self.name}"
            raise ConfigError("trainer.callbacks", got=" and ".join(writers), allowed=allowed, fix=self.fix)
        return self.value


def _writer(write: FrameType | None) -> _Writer:
    """The innermost callback among the callers of the setter that called `write`, else the setter's caller."""
    setter = caller = write and write.f_back
    while setter and caller and caller.f_code.co_name == setter.f_code.co_name:  # a subclass may override the setter
        caller = caller.f_back
    frame = caller
    while frame is not None:
        if isinstance(own := frame.f_locals.get("self"), Callback):
            return _Writer(type(own).__name__, id(own))
        frame = frame.f_back
    assert caller is not None  # CPython has frames
    code = caller.f_code
    return _Writer(f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})", None)
