"""Charts, settings, figures and texts for TensorBoard. Tested by tests/integration/test_run_logs.py."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch.utils.tensorboard.summary import hparams

from app import metric_names
from app.tables import Table
from callbacks.decoding_validation import step_of

EVENT_FILES = "events.out.tfevents.*"  # names of the files that TensorBoard writes

Setting = str | float | bool

_SETTINGS_TAG = "_hparams_/session_start_info"
_STAGE = "(val|test)"
SCORE = re.compile(r"(?:(?:val|test)/)?(task/.+|parse/exact_match)/exit_\d+")  # of a task, or of parses, at an exit
TIMED_PARSES = "(test/)?parse/self_speculative/(acceptance_rate|speedup)/"
# Category -> chart -> patterns of the tags that it shows as lines. A pattern matches from the start of a tag.
_LAYOUT: dict[str, dict[str, list[str]]] = {
    "1 Exits on held-out tokens": {
        "loss by exit (nats a token)": [f"{_STAGE}/{metric_names.EXIT_LOSS}/", f"{_STAGE}/loss$"],
        "agreement with the full model by exit": [f"{_STAGE}/{metric_names.EXIT_AGREEMENT}/"],
        "1 - TV to the full model by exit": [f"{_STAGE}/{metric_names.EXIT_ACCEPTANCE}/"],
    },
    "2 Self-speculative decoding": {
        "acceptance, tokens a round, speedup": [
            f"{metric_names.DECODE_ACCEPTANCE_RATE}$",
            f"{metric_names.DECODE_TOKENS_PER_ROUND}$",
            f"{metric_names.DECODE_SPEEDUP}$",
            TIMED_PARSES,
        ],
    },
    "3 Training": {
        "training loss by exit, at the steps at which it is on": [
            f"{metric_names.TRAIN_LOSS}$",
            f"{metric_names.TRAIN_EXIT_LOSS}/",
        ],
        "dropout rate by depth": [f"{metric_names.DROPOUT_RATE}/"],
        "gradient norm by depth": [f"{metric_names.GRADIENT_NORM}/block_"],
    },
    "4 Throughput": {
        "tokens a second": [f"{metric_names.TOKENS_PER_SECOND}$"],
        "share of time spent waiting for data, share of blocks saved": [
            f"{metric_names.DATA_WAIT_SHARE}$",
            f"{metric_names.BLOCKS_SAVED_SHARE}$",
        ],
    },
}


def tensorboards(trainer: Trainer) -> Iterator[TensorBoardLogger]:
    """Return the run's TensorBoard loggers on the rank that writes, and none on others."""
    for logger in trainer.loggers:
        if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
            yield logger


def write_table(trainer: Trainer, tag: str, table: Table) -> None:
    """Show a table in TensorBoard, if the run logs there."""
    for logger in tensorboards(trainer):
        logger.experiment.add_text(tag, table.as_markdown(), step_of(trainer))


def write_figure(trainer: Trainer, tag: str, draw: Callable[[], Figure]) -> None:
    """Show the figure that `draw` makes in TensorBoard, if the run logs there."""
    for logger in tensorboards(trainer):
        logger.experiment.add_figure(tag, draw(), step_of(trainer))


def arrange(logger: TensorBoardLogger, settings: Mapping[str, Setting], compared: Sequence[str]) -> None:
    """Write the charts of the tab Custom Scalars, and the run's line in the tab HParams, once in a folder.

    They go into the event file of the run, which may be a resumed one: TensorBoard would show a file in a folder of
    its own as another run. The line shows `settings`, and the latest values of the tags in `compared`.
    """
    if _holds_settings(Path(logger.log_dir)):
        return
    write_charts(logger, {})
    writer: Any = logger.experiment
    experiment, start, end = hparams(dict(settings), dict.fromkeys(compared, 0.0))  # type: ignore[no-untyped-call]
    for summary in (experiment, start, end):
        writer.file_writer.add_summary(summary)
    writer.flush()


def score_charts(names: Iterable[str]) -> dict[str, list[str]]:
    """Return a chart for each score of tasks and parses among the logged metrics, with a line for each exit."""
    figures = sorted({match[1].removesuffix(metric_names.DRAFTED) for match in map(SCORE.fullmatch, names) if match})
    return {figure: [f"({_STAGE}/)?{re.escape(figure)}({metric_names.DRAFTED})?/exit_"] for figure in figures}


def write_charts(logger: TensorBoardLogger, scores: Mapping[str, list[str]]) -> None:
    """Write the charts of the tab Custom Scalars, those of `score_charts` among them. The latest ones are shown."""
    layout = _LAYOUT | ({"5 Scores of tasks and parses, by exit": scores} if scores else {})
    logger.experiment.add_custom_scalars(
        {
            category: {chart: ["Multiline", tags] for chart, tags in charts.items()}
            for category, charts in layout.items()
        }
    )


def points(file: Path) -> Iterator[tuple[Any, Any]]:
    """Return the points in a file of TensorBoard's, each as the event and its value."""
    for event in LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            yield event, value


def _holds_settings(folder: Path) -> bool:
    return any(value.tag == _SETTINGS_TAG for file in folder.glob(EVENT_FILES) for _, value in points(file))
