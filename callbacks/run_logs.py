"""Choose what the loggers show, and tell them the settings. Tested by tests/integration/test_run_logs.py."""

import re
from collections.abc import Collection
from functools import cache
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from app import metric_names
from app.benchmark.report import machine
from app.data_ranks import data_ranks
from app.protocols import ArchitectureOwner, FrozenModelHost, LogHost
from callbacks.early_exit_curriculum import EarlyExitCurriculum
from callbacks.layer_dropout_curriculum import LayerDropoutCurriculum
from callbacks.tensorboard import SCORE, TIMED_PARSES, Setting, arrange, score_charts, tensorboards, write_charts

_FEW_BLOCKS = 8  # a model of so many blocks shows everything
_SHOWN_DEPTHS = 4

_BY_DEPTH = re.compile(r"(.*)/(?:exit|block)_(\d+)")
_SHOWN_BY_DEPTH = {
    *(f"{stage}/{metric_names.EXIT_LOSS}" for stage in ("val", "test")),
    *(f"{stage}/{metric_names.EXIT_AGREEMENT}" for stage in ("val", "test")),
    *(f"{stage}/{metric_names.EXIT_ACCEPTANCE}" for stage in ("val", "test")),
    metric_names.TRAIN_EXIT_LOSS,
    metric_names.DROPOUT_RATE,
    metric_names.GRADIENT_NORM,
}
_ALWAYS_ONE = (metric_names.EXIT_AGREEMENT, metric_names.EXIT_ACCEPTANCE)  # of the full model
_DETAILS = {
    metric_names.TRAIN_LABEL_TOKENS,
    metric_names.BLOCKS_SKIPPED_SHARE,
    metric_names.DECODE_AR_TOKENS_PER_SECOND,
    metric_names.DECODE_SS_TOKENS_PER_SECOND,
}
_DETAILED_GROUPS = ("source/epochs/", "source/skipped_records/")


class RunLogs(Callback):
    """Leave the details of deep models out of the loggers, arrange TensorBoard, and log the run's settings.

    A model of 24 blocks has more than 200 metrics, most of them by exit. Of more than 8 blocks, loggers get of each
    figure by depth the four depths that are nearest to a quarter, half, three quarters and all of the blocks (of those
    that ExitQualityMonitor scores), and no metric that follows from another. Where it scores four exits or fewer, they
    get all of these. What is left out stays in tables, figures and trainer.callback_metrics, of training at the steps
    that are logged. Never left out are what a callback monitors, scores of tasks, and of parses the share of exact
    matches, with the speed and acceptance of drafts.

    Args:
        all_metrics: Leave nothing out.
    """

    def __init__(self, *, all_metrics: bool = False) -> None:
        self.all_metrics = all_metrics
        self._charts: dict[str, list[str]] | None = None  # those of scores that the board has; None before it has any

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, LogHost) or self.all_metrics:
            return
        monitored = {getattr(callback, "monitor", None) for callback in trainer.callbacks}  # type: ignore[attr-defined]

        @cache
        def is_left_out(name: str) -> bool:
            return name not in monitored and is_detail(name, pl_module.num_layers, pl_module.monitored_exits)

        pl_module.leave_out_of_logs(is_left_out)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, LogHost):
            pl_module.leave_out_of_logs(lambda _: False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        settings = _settings(trainer, pl_module)
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(settings)
        for board in tensorboards(trainer):
            arrange(board, settings, _compared(pl_module))
        self._charts = self._charts or {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        charts = score_charts(trainer.callback_metrics)
        if trainer.sanity_checking or charts == self._charts:
            return
        self._charts = charts
        for board in tensorboards(trainer):
            write_charts(board, charts)

    on_test_end = on_validation_end


def is_detail(name: str, num_layers: int, scored: Collection[int] = ()) -> bool:
    """Whether a deep model's loggers go without a metric; `scored` are the exits that are measured, none for all."""
    if num_layers <= _FEW_BLOCKS:
        return False
    if name in _DETAILS or name.startswith(_DETAILED_GROUPS):
        return True
    if SCORE.fullmatch(name) or re.match(TIMED_PARSES, name):
        return False  # who asked for it chose its exits
    if not (found := _BY_DEPTH.fullmatch(name)):
        return "_drafts_" in name
    kind, depth = found[1], int(found[2])
    is_always_one = depth == num_layers and kind.endswith(_ALWAYS_ONE)
    are_few = 0 < len(scored) <= _SHOWN_DEPTHS
    is_of_few = are_few and kind.startswith(("val/", "test/"))
    return is_always_one or depth not in shown_depths(num_layers, scored) or not (kind in _SHOWN_BY_DEPTH or is_of_few)


def shown_depths(num_layers: int, scored: Collection[int] = ()) -> set[int]:
    """Return the depths, in blocks run, that stand for all of a deep model: of few measured ones all."""
    measured = sorted(scored) or range(1, num_layers + 1)
    if len(measured) <= _SHOWN_DEPTHS:
        return set(measured)
    quarters = [num_layers * part / _SHOWN_DEPTHS for part in range(1, _SHOWN_DEPTHS + 1)]
    return {min(measured, key=lambda depth: abs(depth - quarter)) for quarter in quarters}


def _settings(trainer: Trainer, pl_module: LightningModule) -> dict[str, Setting]:
    """Return the settings that tell runs apart, and where the run began.

    TensorBoard sorts them by name, and first shows five of them.
    """
    settings: dict[str, Setting] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LayerDropoutCurriculum):
            settings["max_dropout_rate"] = callback.max_dropout_rate
            settings["time_scale"] = callback.time_scale
        elif isinstance(callback, EarlyExitCurriculum):
            settings["curriculum"] = callback.curriculum
            settings["early_exit_scale"] = callback.early_exit_scale
            settings["exit_weights"] = callback.exit_weights
            settings["rotation_interval"] = callback.rotation_interval
            settings["objective"] = callback.loss
    if isinstance(pl_module, ArchitectureOwner):
        config: Any = pl_module.config
        settings["model"] = f"{config.model_type}, {config.num_hidden_layers} x {config.hidden_size}"
    settings["trained"] = _trained(pl_module)
    for optimizer in trainer.optimizers[:1]:
        settings["lr"] = float(optimizer.defaults.get("lr", float("nan")))
    settings["max_steps"] = trainer.max_steps
    settings["micro_batches_a_step"] = trainer.accumulate_grad_batches * data_ranks(trainer).num_replicas
    where = machine(pl_module.device)
    settings |= {name: where[name] for name in ("device", "threads")}
    settings |= where["versions"]
    return settings


def _trained(pl_module: LightningModule) -> str:
    if isinstance(pl_module, FrozenModelHost) and pl_module.has_exit_blocks:
        return "exit blocks"
    return "LoRA" if isinstance(pl_module, FrozenModelHost) and pl_module.peft is not None else "all weights"


def _compared(pl_module: LightningModule) -> list[str]:
    """Return the results by which runs are compared: of the full model, of its half, and of decoding."""
    names = [metric_names.VAL_LOSS]
    if isinstance(pl_module, LogHost):
        num_layers, scored = pl_module.num_layers, pl_module.monitored_exits
        half = min(scored or [num_layers // 2], key=lambda depth: abs(depth - num_layers / 2))
        kinds = (metric_names.EXIT_LOSS, metric_names.EXIT_AGREEMENT) if half < num_layers else ()
        names += [metric_names.of_exit(f"val/{kind}", half) for kind in kinds]
    return [*names, metric_names.DECODE_ACCEPTANCE_RATE, metric_names.DECODE_SPEEDUP, metric_names.TOKENS_PER_SECOND]
