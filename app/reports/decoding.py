"""How fast drafts make decoding: in validation, in benchmarks, and as `tune` found it.

Tested by tests/unit/reports/test_report.py.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from app.benchmark.report import draft_table, n_gram_table, speed_table
from app.benchmark.result import BenchmarkResult
from app.errors import shortened
from app.metric_names import DECODE_ACCEPTANCE_RATE, DECODE_SPEEDUP
from app.reports.blocks import Block, Missing, Prose, Section, Sheet
from app.reports.measurements import Measurement
from app.reports.run_folder import Run
from app.tables import Table, cell

_NOT_OPTIONS = ("eos_token_ids",)  # settings that a command takes from the model
_MOST_SHADE = 0.75  # |speedup - 1| of the deepest color
Grid = Mapping[tuple[int, int], float]  # exit, drafts -> figure


def decoding(runs: Sequence[Run], others: Sequence[Measurement]) -> Section:
    """Heat maps and tables of every run, then those of files that belong to none."""
    blocks: list[Block] = []
    for run in runs:
        blocks += _in_validation(run)
    named = [(run.name, measured) for run in runs for measured in run.measurements]
    for name, measured in [*named, *((str(other.file), other) for other in others)]:
        if measured.kind in _BLOCKS:
            blocks += _shown(name, measured)
    for kind in ("benchmark", "tune"):
        if not any(other.kind == kind for other in others):
            lacking = [run for run in runs if all(measured.kind != kind for measured in run.measurements)]
            blocks += [Missing(what=_lacks(kind, lacking), command=_make(kind, lacking))] if lacking else []
    return Section(name="decoding", title="Decoding", blocks=blocks)


def command_of(measured: Measurement, verb: str, *, skip: Sequence[str] = ()) -> str:
    """The command that wrote a file, from the settings in it."""
    settings = {**measured.settings, "output": str(measured.file)}
    words = ["layerskip", verb]
    for name, value in settings.items():
        if value not in (None, [], {}) and name not in (*_NOT_OPTIONS, *skip):
            words += [f"--{name}", _written(value)]
    where = measured.content.get("environment") or {}
    words += [word for name in ("dtype", "threads") if name in where for word in (f"--{name}", str(where[name]))]
    return shlex.join(words)


def heat_map(title: str, grid: Grid, *, style: str, source: str, command: str, neutral: float | None) -> Sheet:
    """A table exit x drafts, colored by the distance from `neutral`, or from 0 where that is None."""
    exits, drafts = (sorted({key[axis] for key in grid}) for axis in (0, 1))
    rows, shades = [], {}
    for row, layer in enumerate(exits):
        values = [grid.get((layer, count)) for count in drafts]
        rows.append((f"exit {layer}", *(cell(value, style) for value in values)))
        for column, value in enumerate(values, start=1):
            if value is not None:
                away = value if neutral is None else (value - neutral) / _MOST_SHADE
                shades[row, column] = max(-1.0, min(1.0, away))
    columns = ("", *(f"{count} draft{'s' if count > 1 else ''}" for count in drafts))
    return Sheet(table=Table(title, columns, rows), source=source, command=command, shades=shades)


def _shown(name: str, measured: Measurement) -> list[Block]:
    """The blocks of a file, or a word about one that another version wrote or that somebody edited."""
    try:
        return _BLOCKS[measured.kind](name, measured)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {shortened(error)}"
        return [Prose(text=f"{measured.file}: its figures are not as this version writes them ({why}).")]


def _in_validation(run: Run) -> list[Block]:
    """What callbacks.SelfSpeculativeValidation measured while the run trained."""
    blocks: list[Block] = []
    for name, title, style, neutral in (
        (DECODE_SPEEDUP, "Speedup over one token at a time", "{:.2f}x", 1.0),
        (DECODE_ACCEPTANCE_RATE, "Share of drafts accepted", "{:.1%}", None),
    ):
        if grid := run.scalars.latest_by_setting(name):
            callbacks = (run.config.get("trainer") or {}).get("callbacks") or []
            own = [each for each in callbacks if str(each.get("class_path")).endswith("SelfSpeculativeValidation")]
            settings = own[0].get("init_args") or {} if own else {}
            said = ", ".join(
                f"{key} {settings[key]}"
                for key in ("num_prompts", "prompt_length", "max_new_tokens")
                if key in settings
            )
            source = f"Latest validation, {name} in the logs of {run.folder}, by SelfSpeculativeValidation: {said}."
            title = f"{title}, {run.name}"
            blocks.append(heat_map(title, grid, style=style, source=source, command=run.command, neutral=neutral))
    return blocks


def _benchmark(name: str, measured: Measurement) -> list[Block]:
    known = {field.name for field in fields(BenchmarkResult)}
    results = [
        BenchmarkResult(**{key: value for key, value in result.items() if key in known})
        for result in measured.content["results"]
    ]
    command, source = command_of(measured, "benchmark"), f"From {measured.file}."
    blocks: list[Block] = []
    groups: dict[tuple[str, int | None], dict[tuple[int, int], float]] = {}
    for result in results:
        if result.exit_layer is not None and result.num_draft_tokens is not None and result.speedup is not None:
            grid = groups.setdefault((result.strategy, result.n_gram_match), {})
            grid[result.exit_layer, result.num_draft_tokens] = result.speedup
    for (strategy, match), grid in groups.items():
        title = f"Speedup of {strategy}{f' with n-grams of {match}' if match else ''}, {name}"
        blocks.append(heat_map(title, grid, style="{:.2f}x", source=source, command=command, neutral=1.0))
    tables = [speed_table(results, title=f"Speed of every strategy, {name}")]
    tables += [draft_table(results)] if any(result.drafted for result in results) else []
    tables += [n_gram_table(results)] if any(result.drafted_by_n_gram for result in results) else []
    notes = " ".join(f"Note: {note}." for note in measured.content.get("notes", ()))
    blocks += [Sheet(table=table, source=f"{source} {notes}", command=command) for table in tables]
    return blocks


def _tune(name: str, measured: Measurement) -> list[Block]:
    content = measured.content
    runs = [(run, "second run") for run in content["confirmed"]] + [(run, "first run") for run in content["verified"]]
    rows: list[tuple[str, ...]] = [
        (
            str(run["prediction"]["exit_layer"] or "n-grams"),
            cell(run["prediction"]["num_draft_tokens"], "{}"),
            cell(run["prediction"].get("n_gram_match"), "{}"),
            cell(run["prediction"]["speedup"], "{:.2f}x"),
            f"{run['speedup']:.2f}x",
            "-" if not run["interval"] else "{:.2f}..{:.2f}x".format(*run["interval"]),
            cell(run["acceptance_rate"], "{:.1%}"),
            f"{run['identical_to_autoregressive']:.0%}",
            which,
        )
        for run, which in runs
    ]
    columns = (
        "exit",
        "drafts",
        "n-grams of",
        "predicted",
        "speedup",
        "95 % interval",
        "acceptance",
        "identical",
        "run",
    )
    table = Table(f"What tune measured, {name}", columns, rows)
    command = command_of(measured, "tune", skip=("output",)) + " --json" if measured.settings else ""
    said = "" if command else " It does not tell the command that wrote it."
    decision = f"Decision: {content['reason']}."
    agreement = [(entry["exit_layer"], entry["agreement"]) for entry in content["exits"]]
    layers = Table(
        f"Agreement with the full model on its own text, {name}",
        ("exit layer", "agreement"),
        [(str(layer), cell(share, "{:.1%}")) for layer, share in agreement],
    )
    source = f"From {measured.file}.{said}"
    return [
        Sheet(table=table, source=f"{source} {decision}", command=command),
        Sheet(table=layers, source=source, command=command),
    ]


def _parses(name: str, measured: Measurement) -> list[Block]:
    """The file that callbacks.ParseValidation writes."""
    rows: list[tuple[str, ...]] = [
        (
            record["strategy"],
            cell(record["exit_layer"], "{}"),
            cell(record["num_draft_tokens"], "{}"),
            cell(record["exact_match"], "{:.1%}"),
            cell(record["well_formed"], "{:.1%}"),
            cell(record.get("speedup"), "{:.2f}x"),
            str(record["num_examples"]),
        )
        for record in measured.content["results"]
    ]
    columns = ("strategy", "exit", "drafts", "exact match", "well-formed", "speedup", "examples")
    table = Table(f"Semantic parses of stage {measured.content['stage']}, {name}", columns, rows)
    source = f"From {measured.file}, by callbacks.ParseValidation; checkpoint {measured.content['checkpoint']}."
    return [Sheet(table=table, source=source), Prose(text="Parses of early exits are lossy, those of drafts are not.")]


_BLOCKS = {"benchmark": _benchmark, "tune": _tune, "parses": _parses}


def _lacks(kind: str, lacking: Sequence[Run]) -> str:
    return f"No {kind} of {', '.join(run.name for run in lacking)}."


def _make(kind: str, lacking: Sequence[Run]) -> str:
    lines = []
    for run in lacking:
        model = run.checkpoint.file if run.checkpoint is not None else run.folder / "checkpoints" / "last.ckpt"
        prompts, layers = run.folder / "prompts.jsonl", run.num_layers or 8
        exits = sorted({max(1, layers // 8), max(1, layers // 6), max(1, layers // 4)})
        first = f"layerskip data --config {run.folder / 'config.yaml'} --prompts {prompts}"
        if kind == "benchmark":
            grid = f"--strategies '[self_speculative]' --exit_layers '{exits}' --num_draft_tokens '[2, 4, 6]'"
            second = (
                f"layerskip benchmark --model {model} --prompts {prompts} {grid} --output {run.folder}/benchmark.json"
            )
        else:
            second = f"layerskip tune --model {model} --prompts {prompts} --json > {run.folder}/tune.json"
        lines += [first, second]
    return "\n".join(lines)


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def belongs_to(measured: Measurement, run: Run) -> bool:
    """Whether a file measured a model that lies in the folder of a run."""
    model = measured.settings.get("model")
    return isinstance(model, str) and Path(model).resolve().is_relative_to(run.folder.resolve())
