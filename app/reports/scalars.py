"""The scalars that a run has logged, from TensorBoard's event files and from metrics.csv.

Lightning logs step number n, counted from 1, at n - 1. Here all steps are counted from 1.
Tested by tests/unit/reports/test_run_folder.py.
"""

import csv
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from app.errors import shortened
from app.metric_names import DECODE_ACCEPTANCE_RATE, DECODE_SPEEDUP

Series = Mapping[int, float]  # step, counted from 1 -> value, which may be NaN

_EVENTS, _CSV, _SETTINGS = "events.out.tfevents.*", "metrics.csv", "hparams.yaml"  # as Lightning's loggers name them
_FRAME = 16  # bytes of an event file beside each record: its length and two checksums
_EXIT = re.compile(r"exit_(\d+)")
_TEXT, _TABLE = "/text_summary", "decode/self_speculative"
_COLUMNS = {DECODE_SPEEDUP: "speedup", DECODE_ACCEPTANCE_RATE: "acceptance"}
_NUMBER = re.compile(r"([\d.]+)(%|x)$")
_SETTING = re.compile(r"exit_(\d+)_drafts_(\d+)")


@dataclass
class Scalars:
    """The points of each metric, the files they are from, and what is wrong with these."""

    series: dict[str, dict[int, float]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # the latest text of each name, such as a table in Markdown
    times: list[float] = field(default_factory=list)  # first and last, in seconds since 1970; empty if none is known
    settings: dict[str, Any] = field(default_factory=dict)  # with which, and where, the run began, as RunLogs tells

    def of(self, name: str) -> Series:
        """The points of a metric in the order of their steps; empty if it was not logged."""
        return dict(sorted(self.series.get(name, {}).items()))

    def by_exit(self, name: str) -> dict[int, Series]:
        found = ((_EXIT.fullmatch(key), key) for key in self._below(name))
        return dict(sorted((int(match[1]), self.of(f"{name}/{key}")) for match, key in found if match))

    def latest_by_setting(self, name: str) -> dict[tuple[int, int], float]:
        """The latest value of a metric of decoding, by exit and number of drafts."""
        found = ((_SETTING.fullmatch(key), key) for key in self._below(name))
        latest = {
            (int(match[1]), int(match[2])): [*self.of(f"{name}/{key}").values()][-1] for match, key in found if match
        }
        return dict(sorted(latest.items())) or self._of_table(name)

    @property
    def last_step(self) -> int:
        return max((step for points in self.series.values() for step in points), default=0)

    def _of_table(self, name: str) -> dict[tuple[int, int], float]:
        """The same from the table of SelfSpeculativeValidation, since deep models log of a setting nothing else."""
        lines = [line.strip("| ").split(" | ") for line in self.texts.get(_TABLE, "").splitlines() if line[:1] == "|"]
        if len(lines) < 3 or (column := _COLUMNS.get(name)) not in lines[0]:
            return {}
        found = {}
        for row in (dict(zip(lines[0], cells, strict=False)) for cells in lines[2:]):
            if match := _NUMBER.match(row.get(column, "")):
                value = float(match[1]) / (100 if match[2] == "%" else 1)
                found[int(row["exit"]), int(row["drafts"])] = value
        return found

    def _below(self, name: str) -> Iterator[str]:
        return (key.removeprefix(f"{name}/") for key in self.series if key.startswith(f"{name}/"))

    def _seen_at(self, seconds: float) -> None:
        self.times = [min([*self.times, seconds]), max([*self.times, seconds])]


def has_logs(folder: Path) -> bool:
    """Whether a run has logged to files in this folder."""
    return (folder / _CSV).is_file() or any(folder.glob(_EVENTS))


def read_scalars(folder: Path) -> Scalars:
    """Read all points, or raise OSError. What comes before the damage in a file is kept, and a note tells of it."""
    scalars = Scalars()
    for file in sorted(folder.glob(_EVENTS)):  # their names begin with the time they were opened
        _read_events(file, scalars)
    if (file := folder / _CSV).is_file():
        _read_csv(file, scalars)
    if (file := folder / _SETTINGS).is_file():
        _read_settings(file, scalars)
    if not scalars.series:
        scalars.notes.append(f"no measurement could be read from {', '.join(scalars.files)}")
    for name, points in sorted(scalars.series.items()):
        if bad := sorted(step for step, value in points.items() if not math.isfinite(value)):
            many = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            scalars.notes.append(f"{name} is not finite at step {bad[0]}{many}: curves have a gap there")
    return scalars


def _read_events(file: Path, scalars: Scalars) -> None:
    file.open("rb").close()  # an error of its own for what cannot be read, where TensorBoard's names an operation
    scalars.files.append(file.name)
    size, whole = file.stat().st_size, 0
    for record in RawEventFileLoader(str(file)).Load():
        try:
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.tag == SESSION_START_INFO_TAG:
                    told = HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info.hparams
                    scalars.settings |= {name: each.string_value or each.number_value for name, each in told.items()}
        except Exception:  # protobuf's error, for a record that is no event
            break
        whole += len(record) + _FRAME
        if event.session_log.status == SessionLog.START:  # the run was resumed: later points are logged again
            for points in scalars.series.values():
                for step in [step for step in points if step > event.step]:
                    del points[step]
        for value in event.summary.value:
            if value.tag.endswith(_TEXT) and value.tensor.string_val:
                scalars.texts[value.tag.removesuffix(_TEXT)] = value.tensor.string_val[0].decode(errors="replace")
            if value.HasField("simple_value"):
                scalars.series.setdefault(value.tag, {})[event.step + 1] = value.simple_value
                scalars._seen_at(event.wall_time)
    if whole < size:
        scalars.notes.append(
            f"{file.name}: its last {size - whole:,} of {size:,} bytes are cut off or damaged, and were left out"
        )


def _read_csv(file: Path, scalars: Scalars) -> None:
    scalars.files.append(file.name)
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        text = lines.read()
    rows = list(csv.reader(text.splitlines()))
    names = rows[0] if rows else []
    for number, row in enumerate(rows[1:], start=2):
        try:
            if len(row) != len(names) or (number == len(rows) and not text.endswith("\n")):
                raise ValueError
            cells = {name: float(cell) for name, cell in zip_longest(names, row) if cell}
            step = int(cells.pop("step")) + 1
        except (ValueError, KeyError, OverflowError):
            scalars.notes.append(f"{file.name}: line {number} of {len(rows)} is cut off or damaged, and was left out")
            continue
        for name, value in cells.items():
            scalars.series.setdefault(name, {})[step] = value


def _read_settings(file: Path, scalars: Scalars) -> None:
    try:
        told = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        scalars.notes.append(f"{file.name} is damaged ({shortened(error)}), and was left out")
        return
    scalars.settings |= told if isinstance(told, dict) else {}
