"""`layerskip plot`: what the exits of several runs score, in one picture."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from matplotlib.figure import Figure

from app.checkpoints.run_record import RunRecord
from app.checkpoints.weights import is_trained_weights, open_trained_weights
from app.cli.parsing.verb_parser import call_verb
from app.errors import CheckpointError, ConfigError, check_output_file
from app.exits.quality import ExitScore
from app.exits.report import MOST_RUNS, History, exit_curves_figure, scaling_figure
from app.topv2.report import Metric, exact_match_figure, read_report
from app.whole_file import write_figure

_T = TypeVar("_T")


def plot(
    *,
    output: str,
    results: list[str] | None = None,
    checkpoints: list[str] | None = None,
    metric: Metric = "exact_match",
    exit_layer: int | None = None,
) -> None:
    """Draw several runs in one picture: scores of generated parses over exits, or of each exit over training.

    Args:
        output: PNG file to write.
        metric: Score that is drawn of the results.
        exit_layer: Of the checkpoints, draw the perplexity of this exit and of the full model over tokens instead (the
            paper's Fig. 11), in blocks run.
    """
    path = check_output_file(output, suffix=".png")
    if (results is None) == (checkpoints is None):
        raise ConfigError("results", got="both" if results else "neither", allowed="either results or checkpoints")
    if results is not None and exit_layer is not None:
        raise ConfigError("exit_layer", got=exit_layer, allowed="an exit with checkpoints, none with results")
    if results is not None:
        figure = exact_match_figure(_read("results", results, read_report), metric=metric)
    else:
        if len(checkpoints or ()) > MOST_RUNS:
            raise ConfigError("checkpoints", got=len(checkpoints or ()), allowed=f"1..{MOST_RUNS}")
        runs = _read("checkpoints", checkpoints or [], _read_curve)
        figure = exit_curves_figure(runs) if exit_layer is None else _scaling_figure(runs, exit_layer)
    write_figure(path, figure)
    print(f"figure: {path}")


def _scaling_figure(runs: dict[str, History], exit_layer: int) -> Figure:
    for label, curve in runs.items():
        measured = sorted({layer for scores in curve.values() for layer in scores})
        if exit_layer not in measured[:-1]:
            exits = ", ".join(map(str, measured[:-1]))
            raise ConfigError("exit_layer", got=exit_layer, allowed=f"an early exit that {label} measured: {exits}")
    return scaling_figure(runs, exit_layer=exit_layer)


def _read(field: str, given: list[str], read: Callable[[Path], _T]) -> dict[str, _T]:
    """Read the file of each label."""
    runs: dict[str, _T] = {}
    for named in given:
        label, equals, file = named.partition("=")
        if not (label and equals and file):
            raise ConfigError(field, got=named, allowed="LABEL=FILE")
        if label in runs:
            raise ConfigError(field, got=given, allowed="each label once", fix=f"{label} is there twice")
        runs[label] = read(Path(file))
    return runs


def _read_curve(path: Path) -> History:
    """Tell what the validations of a run measured, by the number of tokens trained on until then."""
    if not is_trained_weights(path):
        allowed = "a checkpoint of layerskip fit: a .ckpt file, or a directory of shards"
        raise ConfigError("checkpoints", got=str(path), allowed=allowed)
    record = RunRecord.of(path, open_trained_weights(path).metadata)
    if not record.history or not record.tokens:
        lacks = "no count of tokens, as datamodules.TextCodeDataModule keeps one"
        what = lacks if record.history else "no measurement of callbacks.ExitQualityMonitor"
        raise CheckpointError(f"checkpoint {path}: there is {what}")
    return {
        round(step * record.tokens / record.steps): {layer: ExitScore(*score) for layer, score in scores.items()}
        for step, scores in record.history.items()
    }


_HELP = {
    "results": "One or several LABEL=FILE, with files that callbacks.ParseValidation wrote (parse_test.json).",
    "checkpoints": (
        "Instead, one to four LABEL=CHECKPOINT of runs with callbacks.ExitQualityMonitor: agreement of early exits and"
        " loss of the full model are drawn over tokens."
    ),
}
run = partial(
    call_verb, plot, by_hand={name: {"type": str, "nargs": "+", "help": text} for name, text in _HELP.items()}
)
