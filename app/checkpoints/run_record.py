"""What a checkpoint tells about its run, for model cards and plots. Tested by tests/unit/export/test_model_card.py."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from app.errors import CheckpointError

# Entries of a checkpoint: the run's resolved config as YAML, and the generation config of the model.
RUN_CONFIG_KEY = "run_config"
GENERATION_CONFIG_KEY = "generation_config"

_CACHED_STATES = "CachedStatesDataModule"  # entry of the datamodule of that name
_GROUPS = {"model", "data", "trainer", "layer_dropout", "early_exit", "seed_everything"}  # of a config of `fit`
_HUB_CACHE = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")

Scores = Mapping[int, tuple[float, ...]]  # by exit layer: the figures of app.exits.quality.ExitScore, in its order


class SourceShare(NamedTuple):
    """A source of training data: the share of tokens asked for, and the tokens delivered if they were counted."""

    name: str
    weight: float
    tokens: int | None


@dataclass(frozen=True)
class RunRecord:
    """A run, from the checkpoint's entries other than weights, and from its config, which may be empty."""

    metadata: Mapping[str, Any]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, Any]) -> "RunRecord":
        """The record of checkpoint `path`, with the config in it or beside its folder; CheckpointError if damaged."""
        file = path.resolve().parent.parent / "config.yaml"
        try:
            if RUN_CONFIG_KEY in metadata:
                config = yaml.safe_load(metadata[RUN_CONFIG_KEY])
            else:
                config = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CheckpointError(f"the config of checkpoint {path} is damaged ({error})") from error
        is_resolved = (
            isinstance(config, Mapping) and config.keys() >= _GROUPS and "pretrained" in (config["model"] or ())
        )
        return cls(metadata, config if is_resolved else {})  # a config written by hand leaves out what has a default

    @property
    def steps(self) -> int:
        return int(self.metadata["global_step"])

    @property
    def pretrained(self) -> str | None:
        """The model that the run continued, as a hub would call it: never a path of the machine it ran on."""
        if (path := self._pretrained_path) is None:
            return None
        if cached := _HUB_CACHE.search(path):
            return f"{cached[1]}/{cached[2]}"
        return str(path) if path.count("/") <= 1 and not Path(path).exists() else Path(path).name

    @property
    def pretrained_folder(self) -> Path | None:
        """The folder of that model, if it is on this machine."""
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
        return (self.config["data"].get("init_args") or {}) if self.config else {}

    @property
    def sources(self) -> list[SourceShare]:
        """The sources of a streamed mixture; empty for other data."""
        states = (value for value in self.metadata.values() if isinstance(value, Mapping))
        state = next((state for state in states if {"sources", "lanes"} <= state.keys()), None)
        if state is None:
            return []
        named = [entry.rpartition("=") for entry in state["sources"].split(", ")]
        total = sum(float(weight) for _, _, weight in named)
        tokens = [sum(lane) for lane in zip(*(lane[1] for lane in state["lanes"].values()), strict=True)]
        return [
            SourceShare(name, float(weight) / total, count)
            for (name, _, weight), count in zip(named, tokens or [None] * len(named), strict=True)
        ]

    @property
    def tokens(self) -> int | None:
        """Tokens trained on, without padding; None if they were not counted.

        A stream counts its tokens. Rows of cached states are full unless they were packed by documents, so that steps,
        rows of a step and the length of a row tell their number.
        """
        if counts := [source.tokens for source in self.sources]:
            return sum(count for count in counts if count is not None)
        cached = self.metadata.get(_CACHED_STATES) or {}
        match self.data_settings.get("corpus"):
            case {"init_args": {"seq_len": int(length), "packing": "split"}} if cached:
                return self.steps * int(cached["batches_per_step"]) * int(cached["batch_size"]) * length
        return None

    @property
    def exits(self) -> tuple[int, Scores] | None:
        return max(self.history.items(), default=None, key=lambda measured: measured[0])

    @property
    def history(self) -> Mapping[int, Scores]:
        history = (self.metadata.get("callbacks") or {}).get("ExitQualityMonitor", {}).get("history") or {}
        return {
            step: {exit_layer: tuple(score) for exit_layer, score in sorted(scores.items())}
            for step, scores in sorted(history.items())
        }
