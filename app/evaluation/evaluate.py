"""Runs tasks over the exits of a model: reads all rows first, then scores them, and keeps each example as it is done.

Tested by tests/contract/test_evaluate.py.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from app.errors import ConfigError, DataError, check_choice, check_exits
from app.evaluation.encoding import ExampleEncoder
from app.evaluation.generation import check_program_tasks, run_generation
from app.evaluation.likelihood_tasks import run_choices, run_windows
from app.evaluation.progress import Progress
from app.evaluation.records import EvaluatedModel, EvaluationSettings, Record, Runner
from app.evaluation.rows import Item, read_items, spread
from app.evaluation.task import ChoiceTask, GenerationTask, Task, TextTask
from app.evaluation.tasks import TASKS

_WINDOW = 1024  # tokens, unless the context is shorter
_FREE = ("batch_size", "allow_running_programs")  # settings on which no result depends

RUNNERS: dict[type[Task], Runner] = {
    ChoiceTask: run_choices,
    TextTask: run_windows,
    GenerationTask: run_generation,
}


class Work(NamedTuple):
    """A task with the items that are to be scored, and where they came from."""

    task: Task
    path: str | None
    items: list[Item]


def chosen_tasks(tasks: Sequence[str]) -> dict[str, str | None]:
    """The path of each task, None for the hub, from NAME or NAME=PATH; ConfigError for an unknown task or one twice."""
    chosen: dict[str, str | None] = {}
    for entry in tasks:
        name, equals, path = entry.partition("=")
        check_choice("tasks", name, TASKS)
        if name in chosen:
            raise ConfigError("tasks", got=list(tasks), allowed="each task once", fix=f"{name} is there twice")
        if equals and not path:
            raise ConfigError("tasks", got=entry, allowed="NAME or NAME=PATH")
        chosen[name] = path if equals else None
    if not chosen:
        raise ConfigError("tasks", got=list(tasks), allowed=f"one or several of {' | '.join(TASKS)}")
    return chosen


def exits_of(subject: EvaluatedModel, settings: EvaluationSettings) -> tuple[int, ...]:
    """The exits that are measured: those asked for, or else every quarter of the depth."""
    num_layers = subject.decoder.num_layers
    quarters = {max(1, round(num_layers * part / 4)) for part in (1, 2, 3, 4)}
    own = {layer for layer in range(1, num_layers) if subject.decoder.exit_span(layer)}
    asked = sorted(quarters | own) if settings.exit_layers is None else settings.exit_layers
    check_exits(asked, num_layers=num_layers)
    return tuple(sorted(set(asked)))


def prepare(
    tasks: Mapping[str, str | None], settings: EvaluationSettings, *, tokenizer: Any, max_length: int
) -> list[Work]:
    """Read the rows of all tasks, so that what is wrong with one of them is said before anything runs.

    Args:
        tasks: From `chosen_tasks`.
        settings: Of the evaluation.
        tokenizer: Of transformers.
        max_length: The model's context in tokens.
    """
    window = settings.window or min(_WINDOW, max_length)
    if window > max_length:
        raise ConfigError("window", got=window, allowed=f"2..{max_length}, the model's context")
    check_program_tasks([TASKS[name] for name in tasks], settings)
    work = []
    for name, path in tasks.items():
        task = TASKS[name]
        items = read_items(task, path, limit=settings.limit, num_shots=settings.num_shots)
        if isinstance(task, TextTask):
            windows = ExampleEncoder(tokenizer).windows(items, size=window)
            if not windows:
                raise DataError(f"task {name}: {path} holds no text")
            items = [windows[index] for index in spread([item.group for item in windows], settings.limit)]
        work.append(Work(task, path, items))
    return work


def identity(work: Sequence[Work]) -> dict[str, str]:
    """For each task a hash of its examples, prompts included, by which results of other rows are told apart."""
    return {
        each.task.name: hashlib.sha256(repr([(item.row, item.example) for item in each.items]).encode()).hexdigest()
        for each in work
    }


def evaluate(
    subject: EvaluatedModel,
    work: Sequence[Work],
    settings: EvaluationSettings,
    *,
    done: Iterable[tuple[str, int]] = (),
    on_record: Callable[[Record], None],
    say: Callable[[str], None] | None = None,
) -> None:
    """Score what is not done yet, in the order of the tasks.

    Args:
        subject: The model, in eval mode.
        work: From `prepare`.
        done: Task and row of what is not to be repeated.
        on_record: Takes each example as it is done.
        say: Takes a line of progress with the time that is left, from time to time.
    """
    exit_layers, finished = exits_of(subject, settings), set(done)
    items_of = {each.task.name: each.items for each in work}
    progress = Progress(items_of, finished, say, batch_size=settings.batch_size)
    for task, _, items in work:
        open_items = [item for item in items if (task.name, item.row) not in finished]
        if not open_items:
            continue
        run = RUNNERS[type(task)]
        with torch.no_grad():
            for record in run(subject, task, open_items, exit_layers, settings):
                on_record(record)
                progress.count(record)


def settings_document(
    subject: EvaluatedModel, work: Sequence[Work], settings: EvaluationSettings, *, weights: str, dtype: str
) -> dict[str, Any]:
    """All that results depend on; what is not in it may differ between the runs that make up one file of results."""
    return {
        "weights": weights,
        "dtype": dtype,
        **{name: value for name, value in asdict(settings).items() if name not in _FREE},
        "exit_layers": list(exits_of(subject, settings)),
        "examples": identity(work),
    }
