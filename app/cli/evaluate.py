"""`layerskip evaluate`: every exit of a model, scored on tasks. Tested by tests/contract/test_evaluate.py."""

import logging
from functools import partial
from typing import Any

from app.benchmark.report import environment
from app.cli.parsing.verb_parser import call_verb
from app.cli.tables import print_table
from app.errors import DataError, check_new, check_output_file
from app.evaluation.confident_exits import check_thresholds, confident_exits
from app.evaluation.evaluate import chosen_tasks, exits_of, prepare, settings_document
from app.evaluation.evaluate import evaluate as score
from app.evaluation.journal import Journal
from app.evaluation.output import notes, write_confident_exits, write_results
from app.evaluation.records import EvaluatedModel, EvaluationSettings
from app.evaluation.results import exits_table
from app.evaluation.task import ChoiceTask
from app.evaluation.tasks import TASKS
from app.exits.confident_exit import ConfidentExit
from app.generation.loaded_model import LoadedModel, LoadOptions
from app.model.weights_hash import weights_hash
from app.model_files.exit_blocks import stored_exit_blocks
from app.words import model_name

_log = logging.getLogger(__name__)


def evaluate(
    *,
    model: str,
    tasks: list[str],
    output: str,
    loading: LoadOptions,
    exit_thresholds: list[float] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Score every exit of a model on tasks: multiple choice, perplexity of texts, and what it generates.

    Args:
        model: Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file.
        output: JSON file to write; beside it are written a table (.csv), a figure (.png), and each example as it is
            done (.examples.jsonl), from which the same command goes on after it was stopped.
        loading: See LoadOptions.
        exit_thresholds: Also show what it would give and save to answer each question of multiple choice at the first
            exit whose choice is likelier than a threshold, each in [0, 1). This is lossy. A table (.thresholds.csv) and
            a figure (.thresholds.png) are written beside the output.
        overwrite: Replace files of these names, and begin anew where their examples are of other settings.
        options: See EvaluationSettings.
    """
    file = check_output_file(output, suffix=".json")
    examples = file.with_suffix(".examples.jsonl")
    if not overwrite and not examples.exists():  # else it tells whether the results are of the same settings
        endings = (".json", ".csv", ".png", ".thresholds.csv", ".thresholds.png")
        check_new(output, map(file.with_suffix, endings))
    settings, chosen = EvaluationSettings(**options), chosen_tasks(tasks)
    thresholds = None if exit_thresholds is None else check_thresholds(exit_thresholds)
    if thresholds and not any(isinstance(TASKS[name], ChoiceTask) for name in chosen):
        _log.warning("exit_thresholds=%s has no effect without a task of multiple choice", exit_thresholds)
    loaded = loading.load(model, draft_vocabulary="none")
    subject = EvaluatedModel(loaded.decoder, loaded.tokenizer, loaded.eos_token_ids)
    work = prepare(chosen, settings, tokenizer=loaded.tokenizer, max_length=loaded.decoder.max_length)
    identity = settings_document(subject, work, settings, weights=_hash(model, loaded), dtype=loaded.weights_type)
    with Journal(examples, identity, overwrite=overwrite) as journal:
        try:
            score(subject, work, settings, done=[*journal.records], on_record=journal.add, say=_log.info)
        except KeyboardInterrupt:
            _log.info("%d examples are done: the same command goes on from there", len(journal.records))
            raise
    records = [journal.records[each.task.name, item.row] for each in work for item in each.items]
    if not any(record.scores for record in records):
        fix = "on_long=truncate_left leaves out the beginnings of longer ones"
        raise DataError(f"tasks: no row fits the model's context of {loaded.decoder.max_length} tokens; {fix}")
    where = environment(device=loaded.decoder.device, dtype=loaded.weights_type)
    title = f"{model_name(model)}, {where['dtype']}"
    asked = {"model": model, "tasks": chosen, "batch_size": settings.batch_size, "exit_thresholds": thresholds}
    about: dict[str, Any] = {"environment": where, "settings": asked | identity}
    confident: list[ConfidentExit] = []
    if thresholds:
        own_blocks = {layer: len(loaded.decoder.exit_span(layer)) for layer in exits_of(subject, settings)}
        confident = confident_exits(work, journal.records, thresholds, own_blocks=own_blocks)
        about["confident_exits"] = [each._asdict() for each in confident]
    results = write_results(file, records, tasks=TASKS, title=title, about=about)
    print_table(exits_table(results, TASKS, num_layers=loaded.decoder.num_layers, title=title))
    if confident:
        print_table(write_confident_exits(file, confident, title=title))
    for note in notes(records, results):
        print(f"note: {note}")
    print(f"results: {file}, table: {file.with_suffix('.csv')}, figure: {file.with_suffix('.png')}")
    if confident:
        drawn = file.with_suffix(".thresholds.png")
        print(f"with thresholds: table: {drawn.with_suffix('.csv')}, figure: {drawn}")


def _hash(model: str, loaded: LoadedModel) -> str:
    """What tells the weights from others, those of exit blocks among them."""
    stored = stored_exit_blocks(model)
    own = {} if stored is None else {f"exit_blocks.{name}": each for name, each in stored.state.items()}
    return weights_hash(loaded.model.state_dict() | own, exit_layer=loaded.decoder.num_layers)


_TASKS_HELP = (
    "List of tasks, each NAME for its dataset on the hub or NAME=PATH for a local file or folder of it (.jsonl, .json,"
    f" .csv, .tsv, .parquet, .txt): {', '.join(TASKS)}."
)
run = partial(call_verb, evaluate, by_hand={"tasks": {"type": list[str], "required": True, "help": _TASKS_HELP}})
