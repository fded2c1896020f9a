"""What a checkpoint tells about the run that wrote it, for whoever takes the model away."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from app.errors import CheckpointError

# What `layerskip fit` adds to a checkpoint: its resolved config, as YAML, and the generation config of the model.
RUN_CONFIG_KEY = "run_config"
GENERATION_CONFIG_KEY = "generation_config"

_GROUPS = {"model", "data", "trainer", "layer_dropout", "early_exit", "seed_everything"}  # of a config of `fit`
_HUB_CACHE = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")


class SourceShare(NamedTuple):
    """A source of training data.

    Attributes:
        name: As the run called it.
        weight: Share of tokens asked for, in (0, 1].
        tokens: Delivered; None if it was not counted.
    """

    name: str
    weight: float
    tokens: int | None


@dataclass(frozen=True)
class RunRecord:
    """A run, from its checkpoint and its config.

    Attributes:
        metadata: All of the checkpoint but the weights.
        config: What the command line made of its files and options; empty where nothing tells.
    """

    metadata: Mapping[str, Any]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, Any]) -> RunRecord:
        """Of a checkpoint; its config is in it, or else beside the folder it was written to.

        Raises:
            CheckpointError: If that config is damaged.
        """
        file = path.resolve().parent.parent / "config.yaml"
        try:
            if RUN_CONFIG_KEY in metadata:
                config = yaml.safe_load(metadata[RUN_CONFIG_KEY])
            else:
                config = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CheckpointError(f"the config of checkpoint {path} is damaged ({error})") from error
        whole = isinstance(config, Mapping) and config.keys() >= _GROUPS and "pretrained" in (config["model"] or ())
        return cls(metadata, config if whole else {})  # one written by hand leaves out what has a default

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return int(self.metadata["global_step"])

    @property
    def pretrained(self) -> str | None:
        """What the run continued from, as a hub would call it: never a path of the machine it ran on."""
        if (path := self._pretrained_path) is None:
            return None
        if cached := _HUB_CACHE.search(path):
            return f"{cached[1]}/{cached[2]}"
        return str(path) if path.count("/") <= 1 and not Path(path).exists() else Path(path).name

    @property
    def pretrained_folder(self) -> Path | None:
        """Where that lies, if it is a folder of this machine that is still there."""
        path = self._pretrained_path
        return Path(path) if path is not None and Path(path).is_dir() else None

    @property
    def _pretrained_path(self) -> str | None:
        return self.config["model"]["pretrained"] if self.config else None

    @property
    def base_model(self) -> str | None:
        """`pretrained`, if it is not a file: a hub knows models by their folders."""
        name = self.pretrained
        return None if name is None or name.endswith((".ckpt", ".gguf")) else name

    @property
    def data_settings(self) -> Mapping[str, Any]:
        """The datamodule's."""
        return (self.config["data"].get("init_args") or {}) if self.config else {}

    @property
    def sources(self) -> list[SourceShare]:
        """Of a streamed mixture; empty for other data."""
        state = self._data_state
        if state is None:
            return []
        named = [entry.rpartition("=") for entry in state["sources"].split(", ")]
        total = sum(float(weight) for _, _, weight in named)
        tokens = [sum(lane) for lane in zip(*(lane[1] for lane in state["lanes"].values()), strict=True)]
        delivered = tokens or [None] * len(named)
        return [
            SourceShare(name, float(weight) / total, count)
            for (name, _, weight), count in zip(named, delivered, strict=True)
        ]

    @property
    def tokens(self) -> int | None:
        """Trained on, without padding; None if they were not counted."""
        counts = [source.tokens for source in self.sources]
        return sum(count for count in counts if count is not None) if counts else None

    @property
    def _data_state(self) -> Mapping[str, Any] | None:
        states = (value for value in self.metadata.values() if isinstance(value, Mapping))
        return next((state for state in states if {"sources", "lanes"} <= state.keys()), None)

    @property
    def exits(self) -> tuple[int, Mapping[int, tuple[float, float]]] | None:
        """The latest measurement: its step, and (loss in nats a token, agreement) by exit; None if there is none."""
        history = self.history
        return (max(history), history[max(history)]) if history else None

    @property
    def history(self) -> Mapping[int, Mapping[int, tuple[float, float]]]:
        """Every measurement: (loss in nats a token, agreement) by step and exit; empty if there is none."""
        history = (self.metadata.get("callbacks") or {}).get("ExitQualityMonitor", {}).get("history") or {}
        return {
            step: {exit_layer: tuple(score) for exit_layer, score in sorted(scores.items())}
            for step, scores in sorted(history.items())
        }
