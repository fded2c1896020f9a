"""What callbacks may ask of a module in training, and set in it (protocols of app.protocols, but for decoding)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning.pytorch import LightningModule

from app.errors import ConfigError, check_range
from app.training.micro_batch_work import WorkWatcher
from app.training.owned_setting import OwnedSetting

_OWN = "one of them is enough; of the command line's, --{} leaves it to a callback of your own"


class Dropout(NamedTuple):
    """Layer dropout of a micro-batch: p(l, t) of each block, and whether kept residuals are scaled by 1/(1 - p)."""

    rates: tuple[float, ...]
    rescale: bool = False


class CurriculumHost(LightningModule):
    """Keeps what curricula set, and who set it; a fit in which nobody sets anything is plain next-token training.

    Args:
        num_layers: L, the number of blocks.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self._num_layers = num_layers
        self._dropout = OwnedSetting(
            "dropout rates", Dropout((0.0,) * num_layers), fix=_OWN.format("layer_dropout.max_dropout_rate 0")
        )
        self._exits: OwnedSetting[Mapping[int, float]] = OwnedSetting(
            "exit weights", {num_layers: 1.0}, fix=_OWN.format("early_exit.curriculum none")
        )
        self._dropped_shares = self.dropout_rates
        self._monitored: set[int] = set()
        self._work_watchers: list[WorkWatcher] = []

    @property
    def num_layers(self) -> int:
        """L, the number of blocks."""
        return self._num_layers

    @property
    def dropout_rates(self) -> tuple[float, ...]:
        """p(l, t) in use."""
        return self._dropout.value.rates

    @property
    def dropped_shares(self) -> tuple[float, ...]:
        """For each block the share of samples that skipped it in the latest training micro-batch."""
        return self._dropped_shares

    def set_dropout_rates(self, rates: Sequence[float], *, rescale: bool = False) -> None:
        """Use these rates from the next micro-batch on (protocols.LayerDropoutHost).

        Raises:
            ConfigError: There is not one rate in [0, 1) for each block.
        """
        if len(rates) != self.num_layers:
            raise ConfigError("set_dropout_rates", got=f"{len(rates)} rates", allowed=f"{self.num_layers}, one a block")
        for rate in rates:
            check_range("set_dropout_rates", rate, low=0, high=1, high_open=True)
        self._dropout.write(Dropout(tuple(rates), rescale))

    @property
    def exit_weights(self) -> Mapping[int, float]:
        """w(t, l) in use, by exit layer."""
        return self._exits.value

    def set_exit_weights(self, weights: Mapping[int, float]) -> None:
        """Use these exits and weights from the next micro-batch on (protocols.EarlyExitHost).

        Raises:
            ConfigError: An exit is not one of the model's, or the weights are negative or do not sum to 1.
        """
        for exit_layer, weight in weights.items():
            check_range("set_exit_weights", exit_layer, low=1, high=self.num_layers, fix="exits count blocks run")
            check_range("set_exit_weights", weight, low=0)
        if not math.isclose(total := sum(weights.values()), 1, abs_tol=1e-6):
            raise ConfigError("set_exit_weights", got=dict(weights), allowed=f"weights that sum to 1, not {total:g}")
        self._exits.write(dict(weights))

    def monitor_exits(self, exit_layers: Sequence[int]) -> None:
        """Return these exits' hidden states, too, from every evaluation step (protocols.ExitMonitorHost)."""
        self._monitored.update(exit_layers)

    def watch_work(self, watcher: WorkWatcher) -> None:
        """Show the work of every later training micro-batch, before its forward (protocols.WorkHost)."""
        self._work_watchers.append(watcher)

    def setup(self, stage: str) -> None:
        """Nothing stays in use that a callback of an earlier fit has set."""
        if stage == "fit":
            self._dropout.start_fit(self.trainer.callbacks)  # type: ignore[attr-defined]
            self._exits.start_fit(self.trainer.callbacks)  # type: ignore[attr-defined]

    def curricula_now(self) -> tuple[Dropout, Mapping[int, float]]:
        """Layer dropout and exit weights of the micro-batch that begins.

        Raises:
            ConfigError: Two callbacks have set the same, or several devices would train without the full model.
        """
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        dropout, weights = self._dropout.start_micro_batch(callbacks), self._exits.start_micro_batch(callbacks)
        if self.trainer.world_size > 1 and self.num_layers not in weights:  # blocks above have no gradient to reduce
            allowed = f"the full model, exit {self.num_layers}, among them on more than one device"
            raise ConfigError("set_exit_weights", got=dict(weights), allowed=allowed)
        return dropout, weights
