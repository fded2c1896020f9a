"""`layerskip plot`: exact match over exits of several runs in one picture."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from app.cli.parsing import VerbParser
from app.errors import ConfigError
from app.evaluation.tasks.exact_match_figure import Metric, exact_match_figure
from app.evaluation.tasks.parse_report import read_report


def plot(*, results: list[str], output: str, metric: Metric = "exact_match") -> None:
    """Draw how exact match of generated semantic parses falls from the full model to early exits, a line for each run.

    Args:
        results: One or several LABEL=FILE, each file written by callbacks.ParseValidation into a run's folder
            (parse_test.json or parse_validate.json).
        output: PNG file to write.
        metric: What to draw.
    """
    path = _check_output(output)
    runs = {}
    for named in results:
        label, equals, file = named.partition("=")
        if not (label and equals and file):
            raise ConfigError("results", got=named, allowed="LABEL=FILE")
        if label in runs:
            raise ConfigError("results", got=results, allowed="each label once", fix=f"{label} is there twice")
        runs[label] = read_report(Path(file))
    exact_match_figure(runs, metric=metric).savefig(path, dpi=150)
    print(f"figure: {path}")


def _check_output(output: str) -> Path:
    path = Path(output)
    if path.suffix != ".png" or path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError("output", got=output, allowed="a .png file in a folder that exists and can be written to")
    return path


def run() -> None:
    """Parse and run the verb."""
    parser = VerbParser(prog="layerskip plot", description=(plot.__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=str, nargs="+", required=True, help="One or several LABEL=FILE.")
    parser.add_function_arguments(plot, as_group=False, skip={"results"})
    plot(**parser.parse_args(sys.argv[2:]).as_dict())
