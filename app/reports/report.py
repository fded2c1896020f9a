"""A report: its sections, from runs and from files of figures. Tested by tests/unit/reports/test_report.py."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from app.errors import ConfigError
from app.reports.blocks import Report
from app.reports.decoding import decoding
from app.reports.inside import layers, tasks
from app.reports.measurements import MeasuredFile, NotOursError, read_measurement
from app.reports.recipe import environment, recipe, summary
from app.reports.run_folder import Run, read_runs
from app.reports.training import curves, exits


def make_report(run_dirs: Sequence[str], files: Sequence[str] = ()) -> Report:
    """Read runs and files of figures, and put together what there is; ConfigError if a folder or file is not ours."""
    runs, others = _with_files(read_runs(run_dirs), files)
    sections = [
        summary(runs),
        recipe(runs),
        curves(runs),
        exits(runs),
        decoding(runs, others),
        tasks(runs, others),
        layers(runs, others),
        environment(runs, others),
    ]
    names = " · ".join(run.name for run in runs)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Report(
        title=f"LayerSkip: {names}",
        subtitle="; ".join(f"{run.name} {run.state}" for run in runs),
        made=f"{now}, layerskip-lightning {version('layerskip-lightning')}",
        notes=[f"{run.name}: {note}" for run in runs for note in run.notes],
        sections=[section for section in sections if section.blocks],
    )


def _with_files(runs: list[Run], files: Sequence[str]) -> tuple[list[Run], list[MeasuredFile]]:
    """Give each file to the run whose model it measured; return the others beside the runs."""
    others = []
    for name in files:
        try:
            measured = read_measurement(Path(name))
        except NotOursError as error:
            raise ConfigError("files", got=name, allowed="files that layerskip wrote", fix=str(error)) from error
        owner = next((idx for idx, run in enumerate(runs) if run.owns(measured)), 0 if len(runs) == 1 else None)
        if owner is None:
            others.append(measured)
        elif all(own.file.resolve() != measured.file.resolve() for own in runs[owner].measurements):
            runs[owner] = replace(runs[owner], measurements=[*runs[owner].measurements, measured])
    return runs, others
