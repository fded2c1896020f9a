"""`layerskip plot`: what the exits of several runs score, in one picture."""

from collections.abc import Callable
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, get_args

from matplotlib.figure import Figure

from app.checkpoints.run_record import RunRecord
from app.checkpoints.weights import EXIT_BLOCKS_KEY, is_trained_weights, open_trained_weights
from app.cli.parsing.several import SEVERAL_AT_A_TIME
from app.cli.parsing.verb_parser import call_verb
from app.errors import CheckpointError, ConfigError, check_new, check_output_file
from app.exits.quality import ExitScore
from app.exits.report import (
    MOST_COLORED_RUNS,
    MOST_RUNS,
    CurveMetric,
    History,
    early_exits_figure,
    exit_curves_figure,
    scaling_figure,
)
from app.topv2.report import Metric, exact_match_figure, read_report
from app.whole_file import write_figure

_T = TypeVar("_T")


class _Curve(NamedTuple):
    """What the validations of a run measured, by the number of tokens trained on until then."""

    history: History
    own_exits: frozenset[int]  # those with exit blocks, which alone were trained; empty where the model itself was

    @property
    def early_exits(self) -> dict[int, dict[int, ExitScore]]:
        """The history without the full model."""
        deepest = max(layer for scores in self.history.values() for layer in scores)
        return {
            tokens: {
                layer: score
                for layer, score in scores.items()
                if (layer in self.own_exits if self.own_exits else layer < deepest)
            }
            for tokens, scores in self.history.items()
        }


def plot(
    *,
    output: str,
    results: list[str] | None = None,
    checkpoints: list[str] | None = None,
    metric: Literal[Metric, CurveMetric] | None = None,
    exit_layer: int | None = None,
    overwrite: bool = False,
) -> None:
    """Draw several runs in one picture: scores of generated parses over exits, or of each exit over training.

    Args:
        output: PNG file to write.
        metric: Score to draw. Of results, exact_match (the default), frame_match or well_formed. Of checkpoints,
            agreement or acceptance of the early exits alone; the default for runs of exit blocks is agreement.
        exit_layer: Of the checkpoints, draw the perplexity of this exit and of the full model over tokens instead (the
            paper's Fig. 11), in blocks run.
        overwrite: Replace a file of this name.
    """
    path = check_output_file(output, suffix=".png")
    if not overwrite:
        check_new(output, [path])
    if (results is None) == (checkpoints is None):
        raise ConfigError("results", got="both" if results else "neither", allowed="either results or checkpoints")
    if results is not None and exit_layer is not None:
        raise ConfigError("exit_layer", got=exit_layer, allowed="an exit with checkpoints, none with results")
    of_results, of_checkpoints = get_args(Metric), get_args(CurveMetric)
    if metric is not None and (exit_layer is not None or (metric in of_results) != (results is not None)):
        kinds = f"{' | '.join(of_results)} with results, {' | '.join(of_checkpoints)} with checkpoints"
        raise ConfigError("metric", got=metric, allowed=f"{kinds}, none with exit_layer")
    if results is not None:
        figure = exact_match_figure(_read("results", results, read_report), metric=metric or "exact_match")  # type: ignore[arg-type]
    else:
        figure = _curves(checkpoints or [], metric, exit_layer)  # type: ignore[arg-type]
    write_figure(path, figure)
    print(f"figure: {path}")


def _curves(checkpoints: list[str], metric: CurveMetric | None, exit_layer: int | None) -> Figure:
    if len(checkpoints) > MOST_COLORED_RUNS:
        raise ConfigError("checkpoints", got=len(checkpoints), allowed=f"1..{MOST_COLORED_RUNS}")
    runs = _read("checkpoints", checkpoints, _read_curve)
    if metric is None and any(run.own_exits for run in runs.values()):
        if exit_layer is not None:
            fix = "the full model of exit blocks stays as it is"
            raise ConfigError("exit_layer", got=exit_layer, allowed="none with runs of exit blocks", fix=fix)
        metric = "agreement"
    if metric is not None:
        early = {label: run.early_exits for label, run in runs.items()}
        for label, curve in early.items():
            if not any(isfinite(getattr(score, metric)) for scores in curve.values() for score in scores.values()):
                raise ConfigError("metric", got=metric, allowed=f"what {label} measured of an early exit")
        return early_exits_figure(early, metric=metric)
    if len(runs) > MOST_RUNS:
        raise ConfigError("checkpoints", got=len(runs), allowed=f"1..{MOST_RUNS}", fix="more need a metric")
    histories = {label: run.history for label, run in runs.items()}
    return exit_curves_figure(histories) if exit_layer is None else _scaling_figure(histories, exit_layer)


def _scaling_figure(runs: dict[str, History], exit_layer: int) -> Figure:
    for label, curve in runs.items():
        measured = sorted({layer for scores in curve.values() for layer in scores})
        if exit_layer not in measured[:-1]:
            exits = ", ".join(map(str, measured[:-1]))
            raise ConfigError("exit_layer", got=exit_layer, allowed=f"an early exit that {label} measured: {exits}")
    return scaling_figure(runs, exit_layer=exit_layer)


def _read(field: str, given: list[str], read: Callable[[Path], _T]) -> dict[str, _T]:
    runs: dict[str, _T] = {}
    for named in given:
        label, equals, file = named.partition("=")
        if not (label and equals and file):
            raise ConfigError(field, got=named, allowed="LABEL=FILE")
        if label in runs:
            raise ConfigError(field, got=given, allowed="each label once", fix=f"{label} is there twice")
        runs[label] = read(Path(file))
    return runs


def _read_curve(path: Path) -> _Curve:
    if not is_trained_weights(path):
        allowed = "a checkpoint of layerskip fit: a .ckpt file, or a directory of shards"
        raise ConfigError("checkpoints", got=str(path), allowed=allowed)
    record = RunRecord.of(path, open_trained_weights(path).metadata)
    if not record.history or not record.tokens:
        lacks = "no count of tokens, as datamodules.TextCodeDataModule keeps one"
        what = lacks if record.history else "no measurement of callbacks.ExitQualityMonitor"
        raise CheckpointError(f"checkpoint {path}: there is {what}")
    history = {
        round(step * record.tokens / record.steps): {layer: ExitScore(*score) for layer, score in scores.items()}
        for step, scores in record.history.items()
    }
    return _Curve(history, frozenset(record.metadata.get(EXIT_BLOCKS_KEY) or ()))


_HELP = {
    "results": "One or several LABEL=FILE, with files that callbacks.ParseValidation wrote (parse_test.json).",
    "checkpoints": (
        "Instead, one to four LABEL=CHECKPOINT of runs with callbacks.ExitQualityMonitor: agreement of early exits and"
        " loss of the full model are drawn over tokens. With a metric, or of runs of exit blocks, early exits of up to"
        " eight runs."
    ),
}
run = partial(call_verb, plot, by_hand={name: SEVERAL_AT_A_TIME | {"help": text} for name, text in _HELP.items()})
