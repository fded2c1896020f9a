"""A run, read from its folder: config, logs, checkpoint, and what was measured of its model."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import yaml

from app.checkpoints.run_lock import is_held
from app.checkpoints.run_record import RUN_CONFIG_KEY, RunRecord
from app.checkpoints.weights import is_trained_weights, open_trained_weights
from app.errors import CheckpointError, ConfigError, shortened
from app.exits.quality import ExitScore
from app.exits.report import History
from app.metric_names import EXIT_ACCEPTANCE, EXIT_AGREEMENT, EXIT_KL, EXIT_LOSS
from app.reports.measurements import MeasuredFile, NotOursError, read_measurement
from app.reports.scalars import Scalars, has_logs, read_scalars

MOST_RUNS = 6  # lines that a reader can tell apart
_NOISE = ("trainer.logger", "ckpt_path")  # settings that differ between any two runs, and say nothing of them


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What the latest checkpoint of a run says."""

    file: Path
    record: RunRecord
    model: Mapping[str, Any]  # the model's config, as transformers writes it
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, as far as its folder tells of it; `notes` name what could not be read."""

    name: str
    folder: Path
    config_text: str  # empty where there is none
    config: Mapping[str, Any]
    scalars: Scalars
    checkpoint: Checkpoint | None
    measurements: Sequence[MeasuredFile]
    is_going_on: bool
    notes: Sequence[str]

    @property
    def command(self) -> str:
        return shlex.join(["layerskip", "fit", "--config", str(self.folder / "config.yaml")])

    @property
    def model(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt" if self.checkpoint is None else self.checkpoint.file

    def owns(self, measured: MeasuredFile) -> bool:
        return any(Path(model).resolve().is_relative_to(self.folder.resolve()) for model in measured.models)

    @property
    def steps(self) -> int:
        return max(self.scalars.last_step, 0 if self.checkpoint is None else self.checkpoint.record.steps)

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps that the config asks for; None where it gives no number."""
        asked = (self.config.get("trainer") or {}).get("max_steps")
        return asked if isinstance(asked, int) and asked > 0 else None

    @property
    def state(self) -> str:
        if self.is_going_on:
            return f"going on: step {self.steps:,}{f' of {self.max_steps:,}' if self.max_steps else ''}"
        if self.max_steps and self.steps < self.max_steps:
            return f"stopped at step {self.steps:,} of {self.max_steps:,}"
        return f"finished after {self.steps:,} steps" if self.max_steps else f"{self.steps:,} steps"

    @cached_property
    def history(self) -> History:
        """What each validation measured of each exit: as the checkpoint tells it, completed by the logs."""
        names = EXIT_LOSS, EXIT_AGREEMENT, EXIT_KL, EXIT_ACCEPTANCE
        losses, *others = (self.scalars.by_exit(f"val/{name}") for name in names)
        history: dict[int, dict[int, ExitScore]] = {}
        for layer, points in losses.items():
            for step, loss in points.items():
                # Of the full model, agreement and acceptance are not logged where they are known to be 1.
                absent = 1.0 if layer == max(losses) and len(losses) > 1 else float("nan")
                agreement, acceptance = (by_exit.get(layer, {}).get(step, absent) for by_exit in (others[0], others[2]))
                rest = agreement, others[1].get(layer, {}).get(step, float("nan")), acceptance
                history.setdefault(step, {})[layer] = ExitScore(loss, *rest)
        if self.checkpoint is not None:
            for step, scores in self.checkpoint.record.history.items():
                history[step] = {layer: ExitScore(*score) for layer, score in scores.items()}
        return dict(sorted(history.items()))

    @property
    def num_layers(self) -> int | None:
        """Blocks of the model, where a checkpoint or a measurement of exits tells it."""
        if self.checkpoint is not None:
            return int(self.checkpoint.model["num_hidden_layers"])
        return max((max(scores) for scores in self.history.values()), default=None)

    def settings(self) -> dict[str, Any]:
        """Every setting of the config by its path, without those that say nothing of the run."""
        flat = dict(_leaves(self.config))
        return {path: value for path, value in flat.items() if not path.startswith(_NOISE)}


def read_runs(given: Sequence[str]) -> list[Run]:
    """Read the runs that a user named: each the folder of a run, or LABEL=FOLDER.

    ConfigError for a folder without logs or that cannot be read, one that is named twice, or too many.
    """
    if not 1 <= len(given) <= MOST_RUNS:
        raise ConfigError("run_dirs", got=len(given), allowed=f"1..{MOST_RUNS} folders")
    labels, folders = zip(*map(_label_and_folder, given), strict=True)
    for names, what in ((labels, "label"), ([folder.resolve() for folder in folders], "folder")):
        if twice := next((name for name in names if name and list(names).count(name) > 1), None):
            raise ConfigError("run_dirs", got=list(given), allowed=f"each {what} once", fix=f"{twice} is there twice")
    names = _names(labels, folders)
    try:
        return [_read_run(name, folder) for name, folder in zip(names, folders, strict=True)]
    except OSError as error:
        raise ConfigError("run_dirs", got=list(given), allowed="files that can be read", fix=str(error)) from error


def _label_and_folder(given: str) -> tuple[str, Path]:
    label, equals, path = given.partition("=")
    label, folder = (label, Path(path)) if equals and not Path(given).is_dir() else ("", Path(given))
    allowed = "the folder of a run of layerskip fit, which holds its logs"
    if not folder.is_dir():
        raise ConfigError("run_dirs", got=given, allowed=allowed, fix=f"there is no folder {folder}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ConfigError("run_dirs", got=given, allowed=allowed, fix=f"{folder} may not be read")
    if not has_logs(folder):
        below = sorted(path.parent for path in folder.glob("*/config.yaml") if has_logs(path.parent))
        fix = f"name one of {', '.join(map(str, below))}" if below else "it has no event files and no metrics.csv"
        raise ConfigError("run_dirs", got=given, allowed=allowed, fix=fix)
    return label, folder


def _names(labels: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Name the runs by their labels or by the ends of their paths, as long as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = [label or "/".join(own[-length:]) for label, own in zip(labels, parts, strict=True)]
        if len({*names}) == len(names):
            break
    return names


def _read_run(name: str, folder: Path) -> Run:
    scalars = read_scalars(folder)
    checkpoint, notes = _read_checkpoint(folder / "checkpoints")
    text, config, damage = _read_config(folder, checkpoint)
    measurements, left_out = _read_measurements(folder)
    return Run(
        name=name,
        folder=folder,
        config_text=text,
        config=config,
        scalars=scalars,
        checkpoint=checkpoint,
        measurements=measurements,
        is_going_on=is_held(folder / "checkpoints"),
        notes=[*scalars.notes, *damage, *notes, *left_out],
    )


def _read_config(folder: Path, checkpoint: Checkpoint | None) -> tuple[str, Mapping[str, Any], list[str]]:
    file = folder / "config.yaml"
    if file.is_file():
        text = file.read_text("utf-8", errors="replace")
    elif checkpoint is not None and RUN_CONFIG_KEY in checkpoint.record.metadata:
        text = str(checkpoint.record.metadata[RUN_CONFIG_KEY])
    else:
        return "", {}, ["config.yaml is missing: what the settings were is not known"]
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return text, {}, [f"config.yaml is damaged ({shortened(error)}): its settings are not shown"]
    if not isinstance(config, dict):
        return text, {}, ["config.yaml is no config of layerskip fit: its settings are not shown"]
    return text, config, []


def _read_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the first checkpoint that can be read: last.ckpt, or else the latest."""
    files = [file for file in folder.glob("*") if not file.name.startswith(".") and is_trained_weights(file)]
    notes = []
    for file in sorted(files, key=lambda file: (file.name == "last.ckpt", file.stat().st_mtime), reverse=True):
        try:
            weights = open_trained_weights(file)
            record = RunRecord.of(file, weights.metadata)
        except CheckpointError as error:
            notes.append(str(error))
            continue
        count = sum(prod(shape) for shape, _ in weights.shapes.values())
        model = weights.config.get_text_config().to_dict()
        return Checkpoint(file=file, record=record, model=model, num_parameters=count), notes
    return None, notes


def _read_measurements(folder: Path) -> tuple[list[MeasuredFile], list[str]]:
    found, notes = [], []
    for file in sorted(folder.glob("*.json")):
        try:
            found.append(read_measurement(file))
        except NotOursError as error:
            notes.append(f"{error}: it was left out")
    return found, notes


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is no mapping with its path; a list of classes is taken by their names."""
    if isinstance(node, list) and node and all(isinstance(item, dict) and "class_path" in item for item in node):
        node = {str(item["class_path"]).rpartition(".")[2]: item.get("init_args") or "on" for item in node}
    if not isinstance(node, dict) or not node:
        yield path, node
        return
    for key, value in node.items():
        name = key if key != "init_args" else ""
        yield from _leaves(value, ".".join(filter(None, (path, str(name)))))


def when(seconds: float) -> str:
    """A time as date, hour and minute, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
