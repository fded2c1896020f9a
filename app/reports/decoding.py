"""How fast decoding is: in validation, benchmarks and `tune`. Tested by tests/unit/reports/test_report.py."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from math import log
from shlex import quote
from typing import Any

from app.benchmark.report import benchmark_tables
from app.benchmark.result import BenchmarkResult
from app.metric_names import DECODE_ACCEPTANCE_RATE, DECODE_SPEEDUP
from app.reports.blocks import Block, Prose, Section, Sheet
from app.reports.files import Shown, missing, of_files
from app.reports.measurements import Kind, MeasuredFile
from app.reports.run_folder import Run
from app.tables import Table, cell

_DEEPEST = 3.0  # speedup, or 1 / speedup, of the deepest color
Grid = Mapping[tuple[int, int], float]  # exit, drafts -> figure


def decoding(runs: Sequence[Run], others: Sequence[MeasuredFile]) -> Section:
    """Heat maps and tables of every run, then those of files that belong to none."""
    blocks: list[Block] = []
    for run in runs:
        blocks += _in_validation(run)
    blocks += of_files(runs, others, _BLOCKS)
    for kind in ("benchmark", "tune"):
        blocks += missing(kind, runs, others, partial(_make, kind))
    return Section(name="decoding", title="Decoding", blocks=blocks)


def heat_map(title: str, grid: Grid, *, style: str, source: str, command: str, neutral: float | None) -> Sheet:
    """A table exit x drafts, colored by the figure's ratio to `neutral`, or, where that is None, by the figure."""
    exits, drafts = (sorted({key[axis] for key in grid}) for axis in (0, 1))
    rows, shades = [], {}
    for row, layer in enumerate(exits):
        values = [grid.get((layer, count)) for count in drafts]
        rows.append((f"exit {layer}", *(cell(value, style) for value in values)))
        for column, value in enumerate(values, start=1):
            if value is not None:
                away = value if neutral is None else log(max(value, 1e-9) / neutral) / log(_DEEPEST)
                shades[row, column] = max(-1.0, min(1.0, away))
    columns = ("", *(f"{count} draft{'s' if count > 1 else ''}" for count in drafts))
    return Sheet(table=Table(title, columns, rows), source=source, command=command, shades=shades)


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


def _benchmark(name: str, measured: MeasuredFile) -> list[Block]:
    known = {field.name for field in fields(BenchmarkResult)}
    results = [
        BenchmarkResult(**{key: value for key, value in result.items() if key in known})
        for result in measured.content["results"]
    ]
    command, source = measured.command(), f"From {measured.file}."
    blocks: list[Block] = []
    groups: dict[tuple[str, str, int | None], dict[tuple[int, int], float]] = {}
    for result in results:
        if result.draft_policy == "dynamic":  # which has no exit of its own
            continue
        if result.exit_layer is not None and result.num_draft_tokens is not None and result.speedup is not None:
            grid = groups.setdefault((result.strategy, result.draft_policy, result.n_gram_match), {})
            grid[result.exit_layer, result.num_draft_tokens] = result.speedup
    for (strategy, policy, match), grid in groups.items():
        said = "" if policy == "fixed" else f", {policy}"
        title = f"Speedup of {strategy}{said}{f' with n-grams of {match}' if match else ''}, {name}"
        blocks.append(heat_map(title, grid, style="{:.2f}x", source=source, command=command, neutral=1.0))
    tables = benchmark_tables(results, title=f"Speed of every strategy, {name}")
    notes = " ".join(f"Note: {note}." for note in measured.content.get("notes", ()))
    blocks += [Sheet(table=table, source=f"{source} {notes}", command=command) for table in tables]
    return blocks


def _tune(name: str, measured: MeasuredFile) -> list[Block]:
    content = measured.content
    runs = [(run, "second run") for run in content["confirmed"]] + [(run, "first run") for run in content["verified"]]
    rows: list[tuple[str, ...]] = [
        (
            ", ".join(map(str, exits)) if (exits := _exits(run["prediction"])) else "n-grams",
            cell(run["prediction"]["num_draft_tokens"], "{}" if _is_fixed(run["prediction"]) else "up to {}"),
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
    command = measured.command()
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


def _exits(prediction: Mapping[str, Any]) -> list[int]:
    """Return the exits that a setting of tune drafts from; none where n-grams alone draft."""
    exit_layer = prediction["exit_layer"]
    return [] if exit_layer is None else [exit_layer, *prediction.get("draft_exits", ())]


def _is_fixed(prediction: Mapping[str, Any]) -> bool:
    return bool(prediction.get("draft_policy", "fixed") == "fixed")


def _parses(name: str, measured: MeasuredFile) -> list[Block]:
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


_BLOCKS: dict[Kind, Shown] = {"benchmark": _benchmark, "tune": _tune, "parses": _parses}


def _make(kind: Kind, run: Run) -> str:
    folder, model, layers = quote(str(run.folder)), quote(str(run.model)), run.num_layers or 8
    prompts = f"{folder}/prompts.jsonl"
    first = f"layerskip data --config {folder}/config.yaml --prompts {prompts}\n"
    if kind == "tune":
        return f"{first}layerskip tune --model {model} --prompts {prompts} --json > {folder}/tune.json"
    own = ((run.config.get("model") or {}).get("exit_blocks") or {}).get("exits")
    exits = sorted({int(layer) for layer in own} if own else {max(1, layers // share) for share in (8, 6, 4)})
    grid = f"--strategies '[self_speculative]' --exit_layers '{exits}' --num_draft_tokens '[2, 4, 6]'"
    return f"{first}layerskip benchmark --model {model} --prompts {prompts} {grid} --output {folder}/benchmark.json"
