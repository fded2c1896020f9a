"""Curves of training and of exits, and each run's table of exits. Tested by tests/unit/reports/test_report.py."""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite

from app.exits.report import exit_table
from app.metric_names import TOKENS_PER_SECOND, TRAIN_EXIT_LOSS, TRAIN_LOSS, VAL_LOSS
from app.reports.blocks import Block, Charts, Missing, Section, Sheet
from app.reports.charts import Chart, Line, some_exits
from app.reports.run_folder import Run
from app.reports.scalars import Series
from app.tables import Table, cell

_NATS = "nats a token"
_UNITS = {"loss": _NATS, "agreement": "agreement"}  # of figures of ExitScore


def curves(runs: Sequence[Run]) -> Section:
    """Losses and speed over steps: all runs in one chart, and a chart of exits for each run."""
    charts = [
        _of_scalar(runs, TRAIN_LOSS, "Training loss", _NATS),
        _of_scalar(runs, VAL_LOSS, "Held-out loss of the full model", _NATS),
        *(_training_exits(run, name=f"train-exits-{idx}") for idx, run in enumerate(runs, start=1)),
        _of_scalar(runs, TOKENS_PER_SECOND, "Training speed", "tokens a second"),
    ]
    shown = [chart for chart in charts if chart is not None]
    blocks: list[Block] = [Charts(charts=shown)] if shown else []
    for name, what in ((TRAIN_LOSS, "training loss"), (VAL_LOSS, "held-out loss")):
        if lacking := [run for run in runs if not run.scalars.of(name)]:
            blocks.append(_missing(what, lacking, "{command}", f"{name} is in none of their logs"))
    return Section(name="curves", title="Curves", blocks=blocks)


def exits(runs: Sequence[Run]) -> Section:
    """What each exit learned: the latest measurement over exits, its course over steps, and a table for each run."""
    measured = [(idx, run) for idx, run in enumerate(runs) if run.history]
    blocks: list[Block] = []
    if measured:
        charts = [
            _over_exits(measured, "Held-out loss of each exit", "loss"),
            _over_exits(measured, "Agreement with the full model", "agreement"),
        ]
        several = [(idx, run) for idx, run in measured if len(run.history) > 1]
        courses = [_course(run, idx, "Held-out loss of exits", "loss") for idx, run in several]
        ends = [value for chart in courses for line in chart.lines for value in line.points.values() if isfinite(value)]
        shared = (min(ends), max(ends)) if ends else ()
        charts += [replace(chart, also_in_range=shared) for chart in courses]
        charts += [_course(run, idx, "Agreement of exits", "agreement") for idx, run in several]
        blocks.append(Charts(charts=charts))
        if len(measured) > 1:
            blocks.append(_compared([run for _, run in measured]))
    for _, run in measured:
        table = _of_what_is_known(exit_table(run.history, num_layers=run.num_layers or 0))
        blocks.append(
            Sheet(
                table=table._replace(title=f"{run.name}: {table.title[0].lower()}{table.title[1:]}"),
                source=f"Measured by callbacks.ExitQualityMonitor on the validation rows, in {_where(run)}.",
                command=run.command,
                is_folded=len(measured) > 1,
            )
        )
    if lacking := [run for run in runs if not run.history]:
        adds = "{command} --trainer.callbacks+ callbacks.ExitQualityMonitor"
        blocks.append(_missing("measurement of exits", lacking, adds, "no validation was scored exit by exit"))
    return Section(name="exits", title="Exits", blocks=blocks)


def run_line(run: Run, idx: int, points: Series) -> Line:
    """A line in the color of a run."""
    return Line(run.name, f"run-{idx}", points)


def _of_scalar(runs: Sequence[Run], name: str, title: str, unit: str) -> Chart | None:
    lines = [run_line(run, idx, run.scalars.of(name)) for idx, run in enumerate(runs) if run.scalars.of(name)]
    if not lines:
        return None
    file = name.replace("/", "-")
    return Chart(name=file, title=title, x_label="training step", y_label=unit, lines=lines, source=_logged(runs, name))


def _training_exits(run: Run, *, name: str) -> Chart | None:
    by_exit = run.scalars.by_exit(TRAIN_EXIT_LOSS)
    if len(by_exit) < 2:
        return None
    styles = some_exits([*by_exit], num_layers=max(by_exit))
    lines = [
        Line(_exit_name(layer, style), style, by_exit[layer]) for layer, style in styles.items() if layer in by_exit
    ]
    title, source = f"Training losses of exits, {run.name}", _logged([run], TRAIN_EXIT_LOSS)
    return Chart(name=name, title=title, x_label="training step", y_label=_NATS, lines=lines, source=source)


def _over_exits(measured: Sequence[tuple[int, Run]], title: str, figure: str) -> Chart:
    lines = []
    for idx, run in measured:
        latest = run.history[max(run.history)]
        lines.append(run_line(run, idx, {layer: getattr(score, figure) for layer, score in sorted(latest.items())}))
    return Chart(
        name=f"exits-{figure}",
        title=title,
        x_label="exit layer (blocks run)",
        y_label=_UNITS[figure],
        lines=lines,
        in_percent=figure == "agreement",
        source="Held-out rows at " + ", ".join(f"step {max(run.history):,} of {run.name}" for _, run in measured),
    )


def _of_what_is_known(table: Table) -> Table:
    """The table without columns of figures that only a checkpoint would tell."""
    columns = zip(*([cell(None if "nan" in text else text, "{}") for text in row] for row in table.rows), strict=True)
    return Table.of_columns(table.title, dict(zip(table.columns, columns, strict=True)))


def _compared(runs: Sequence[Run]) -> Sheet:
    """The latest loss and agreement of each exit, the runs side by side."""
    latest = {run.name: run.history[max(run.history)] for run in runs}
    layers = sorted({layer for scores in latest.values() for layer in scores})
    cells = {"exit layer": [f"{layer} (full)" if layer == runs[0].num_layers else str(layer) for layer in layers]}
    for figure, style in (("loss", "{:.3f}"), ("agreement", "{:.1%}")):
        for name, scores in latest.items():
            cells[f"{figure}\n{name}"] = [
                cell(getattr(scores[layer], figure) if layer in scores else None, style) for layer in layers
            ]
    steps = ", ".join(f"step {max(run.history):,} of {run.name}" for run in runs)
    return Sheet(
        table=Table.of_columns("Exits of all runs on held-out tokens", cells),
        source=f"At {steps}, by callbacks.ExitQualityMonitor; commands under Recipe.",
    )


def _course(run: Run, idx: int, title: str, figure: str) -> Chart:
    styles = some_exits(
        sorted({layer for scores in run.history.values() for layer in scores}), num_layers=run.num_layers or 0
    )
    if figure == "agreement":
        styles = {layer: style for layer, style in styles.items() if style != "full"}  # always 100 %
    lines = [
        Line(
            _exit_name(layer, style),
            style,
            {step: getattr(scores[layer], figure) for step, scores in run.history.items() if layer in scores},
        )
        for layer, style in styles.items()
    ]
    return Chart(
        name=f"course-{figure}-{idx + 1}",
        title=f"{title}, {run.name}",
        x_label="training step",
        y_label=_UNITS[figure],
        lines=lines,
        in_percent=figure == "agreement",
        source=f"Held-out rows, in {_where(run)}",
    )


def _exit_name(layer: int, style: str) -> str:
    return f"{layer} (full)" if style == "full" else f"exit {layer}"


def _where(run: Run) -> str:
    if run.checkpoint is not None and run.checkpoint.record.history:
        return str(run.checkpoint.file)
    return f"the logs of {run.folder}"


def _logged(runs: Sequence[Run], name: str) -> str:
    return f"{name} in the logs of {', '.join(str(run.folder) for run in runs)}"


def _missing(what: str, lacking: Sequence[Run], command: str, why: str) -> Missing:
    return Missing(
        what=f"No {what} of {', '.join(run.name for run in lacking)}: {why}.",
        command="\n".join(command.format(command=run.command) for run in lacking),
    )
