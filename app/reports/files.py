"""What sections of a report that show files have in common. Tested by tests/unit/reports/test_report.py."""

from collections.abc import Callable, Mapping, Sequence

from app.errors import shortened
from app.reports.blocks import Block, Missing, Prose
from app.reports.measurements import Kind, MeasuredFile
from app.reports.run_folder import Run

Shown = Callable[[str, MeasuredFile], list[Block]]  # the blocks of a file, by the name of its run


def named_files(runs: Sequence[Run], others: Sequence[MeasuredFile]) -> list[tuple[str, MeasuredFile]]:
    """All files with the names of their runs; those that belong to no run are named by themselves."""
    of_runs = [(run.name, measured) for run in runs for measured in run.measurements]
    return of_runs + [(str(other.file), other) for other in others]


def of_files(runs: Sequence[Run], others: Sequence[MeasuredFile], shown: Mapping[Kind, Shown]) -> list[Block]:
    """The blocks of all files of some kinds, or a word about one that another version wrote or that was edited."""
    blocks: list[Block] = []
    for name, measured in named_files(runs, others):
        if measured.kind in shown:
            try:
                blocks += shown[measured.kind](name, measured)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                why = f"{type(error).__name__}: {shortened(error)}"
                said = f"{measured.file}: its figures are not as this version writes them ({why})."
                blocks.append(Prose(text=said))
    return blocks


def missing(
    kind: Kind, runs: Sequence[Run], others: Sequence[MeasuredFile], command: Callable[[Run], str]
) -> list[Block]:
    """Name the runs whose model no file of a kind measured, unless one of that kind was given that belongs to none."""
    found = [measured for run in runs for measured in run.measurements if measured.kind == kind]
    lacking = [run for run in runs if not any(file in run.measurements or run.owns(file) for file in found)]
    if not lacking or any(other.kind == kind for other in others):
        return []
    what = f"No {_NAMES.get(kind, kind)} of {', '.join(run.name for run in lacking)}."
    return [Missing(what=what, command="\n".join(map(command, lacking)))]


_NAMES: dict[Kind, str] = {
    "tune": "result of tune",
    "evaluation": "evaluation on tasks",
    "lens": "view through the layers",
}
