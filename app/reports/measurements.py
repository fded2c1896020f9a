"""Files of figures that the other verbs write. What a file is shows in what it holds, not in its name.

Tested by tests/unit/reports/test_measurements.py.
"""

import json
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
    "parses": frozenset({"stage", "results", "checkpoint"}),
}


class NotOursError(DataError):
    """A file that no verb of layerskip wrote, or that is cut off."""


@dataclass(frozen=True)
class Measurement:
    """A file of figures, as it is."""

    kind: Kind
    file: Path
    content: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The options of the command that wrote it; empty where the file does not tell them."""
        return self.content.get("settings") or {}


def read_measurement(file: Path) -> Measurement:
    """Read a file of figures.

    Raises:
        NotOursError: It cannot be read, is cut off, or is none that layerskip writes.
    """
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
            return Measurement(kind, file, content)
    raise NotOursError(f"{file}: not a file that layerskip {' | '.join(_KEYS)} writes")
