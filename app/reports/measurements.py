"""Files of figures that the other verbs write. What a file is shows in what it holds, not in its name."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app.errors import DataError, shortened

Kind = Literal["benchmark", "tune", "parses", "evaluation", "lens"]

# The keys that only the files of a kind have together.
_KEYS: dict[Kind, frozenset[str]] = {
    "benchmark": frozenset({"settings", "results", "costs", "draft_model_costs"}),
    "tune": frozenset({"verified", "confirmed", "exits", "reason"}),
    "evaluation": frozenset({"environment", "settings", "rows", "results"}),
    "lens": frozenset({"models", "prompts", "token_texts"}),
    "parses": frozenset({"stage", "results", "checkpoint"}),
}
_VERBS: dict[Kind, str] = {"evaluation": "evaluate"}
_NOT_OPTIONS = ("model", "eos_token_ids", "weights", "examples")  # of the settings: some are taken from the model


class NotOursError(DataError):
    """A file that no verb of layerskip wrote, or that is cut off."""


@dataclass(frozen=True)
class MeasuredFile:
    """A file of figures, as it is."""

    kind: Kind
    file: Path
    content: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The options of the command that wrote it; empty where the file does not tell them."""
        return self.content.get("settings") or {}

    @property
    def models(self) -> list[str]:
        if self.kind == "lens":
            return [str(model["path"]) for model in self.content["models"]]
        return [str(self.settings["model"])] if "model" in self.settings else []

    def command(self) -> str:
        """The command that wrote it, from the settings in it; empty where it does not tell them."""
        if not self.models:
            return ""
        options = {name: value for name, value in self.settings.items() if name not in _NOT_OPTIONS}
        if self.kind == "evaluation":
            options["tasks"] = [f"{task}={path}" if path else task for task, path in options["tasks"].items()]
        where = self.content.get("environment") or {}
        options |= {name: where[name] for name in ("dtype", "threads") if name in where}
        words = ["layerskip", _VERBS.get(self.kind, self.kind)]
        words += [word for model in self.models for word in ("--model", model)]
        if self.kind == "lens" and not options.get("prompts"):
            words += [word for each in self.content["prompts"] for word in ("--prompt", each["prompt"])]
        for name, value in options.items():
            words += [] if value in (None, [], {}) else [f"--{name}", _written(value)]
        return shlex.join([*words, "--json"] if self.kind == "tune" else [*words, "--output", str(self.file)])


def read_measurement(file: Path) -> MeasuredFile:
    """Read a file of figures; NotOursError if it cannot be read, is cut off, or is none that layerskip writes."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise NotOursError(f"{file}: it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise NotOursError(f"{file}: it is cut off or no JSON ({shortened(error)})") from error
    except RecursionError as error:
        raise NotOursError(f"{file}: it is nested too deeply") from error
    for kind, keys in _KEYS.items():
        if isinstance(content, dict) and keys <= content.keys():
            return MeasuredFile(kind, file, content)
    raise NotOursError(f"{file}: not a file that layerskip {' | '.join(_KEYS)} writes")


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
