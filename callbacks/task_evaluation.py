"""Score every exit on tasks, such as multiple choice and perplexity, in validation and test."""

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from app import metric_names
from app.benchmark.report import environment
from app.errors import ConfigError, check_exits
from app.evaluation.evaluate import Work, chosen_tasks, evaluate, prepare, settings_document
from app.evaluation.figure import evaluation_figure
from app.evaluation.journal import Journal
from app.evaluation.output import notes, write_results
from app.evaluation.records import EvaluatedModel, EvaluationSettings, Record
from app.evaluation.results import Result, column, exits_table, results_of, shown
from app.evaluation.tasks import TASKS
from app.model.weights_hash import weights_hash
from app.protocols import ArchitectureOwner, DecodingHost, TokenizerOwner
from app.tables import Table
from app.words import dtype_name
from callbacks.decoding_validation import EveryNthValidation, datamodule_of, lent_decoder, on_all_ranks, step_of
from callbacks.tensorboard import write_figure, write_table

_log = logging.getLogger(__name__)


class TaskEvaluation(EveryNthValidation):
    """Score exits on tasks at the end of validation and test, as `layerskip evaluate` does.

    Logs what tables show: a score of each task and exit. They go to TensorBoard, with a table and a figure, and to the
    logger's folder as `tasks_validate.json` or `tasks_test.json`, with .csv and .png beside it. On one device,
    `validate` and `test` keep each example as it is done, and go on from there if they were stopped.

    Training is not touched, see EveryNthValidation. Rank r of W scores examples r, r + W, ...

    Args:
        tasks: NAME for a task's dataset on the hub, or NAME=PATH for a local file or folder.
        every_n_validations: Score at every n-th validation of a fit, at least 1; `validate` and `test` always do.
        settings: See EvaluationSettings.
    """

    def __init__(self, *, tasks: list[str], every_n_validations: int = 1, **settings: Any) -> None:
        super().__init__(every_n_validations=every_n_validations)
        self.tasks = chosen_tasks(tasks)
        self.settings = EvaluationSettings(**settings)
        self._num_layers, self._work = 0, list[Work]()
        self._table: Table | None = None

    def check_host(self, pl_module: LightningModule) -> None:
        super().check_host(pl_module)
        if not isinstance(pl_module, ArchitectureOwner):
            raise ConfigError("model", got=type(pl_module).__name__, allowed="a module with a config of transformers")
        assert isinstance(pl_module, DecodingHost)
        self._num_layers = pl_module.num_layers
        if self.settings.exit_layers is not None:
            check_exits(self.settings.exit_layers, num_layers=self._num_layers)

    def check_data(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(datamodule := datamodule_of(trainer), TokenizerOwner):
            raise ConfigError("data", got=type(datamodule).__name__, allowed="a datamodule with a tokenizer")
        assert isinstance(pl_module, ArchitectureOwner)
        config: Any = pl_module.config
        max_length = int(config.max_position_embeddings)
        self._work = prepare(self.tasks, self.settings, tokenizer=datamodule.tokenizer, max_length=max_length)

    def measure(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        output = Path(trainer.log_dir or trainer.default_root_dir) / f"tasks_{stage}.json"  # all ranks ask for log_dir
        parts = on_all_ranks(trainer, lambda: self._score(trainer, pl_module, output))
        by_row = {(record.task, record.row): record for part in parts for record in part}
        records = [by_row[each.task.name, item.row] for each in self._work for item in each.items]
        results = shown(results_of(records), TASKS)
        metrics = _metrics(results, "test" if stage == "test" else "val")
        pl_module.log_dict(metrics, sync_dist=True)  # equal on all ranks
        title = f"Exits on tasks ({stage})"
        self._table = exits_table(results, TASKS, num_layers=self._num_layers, title=title)
        if not trainer.is_global_zero:
            return
        write_table(trainer, f"tasks/{stage}", self._table)
        write_figure(trainer, f"tasks/{stage}", lambda: evaluation_figure(results, title=title))
        for note in notes(records, results):
            _log.warning("%s", note)
        dtype = dtype_name(next(pl_module.parameters()).dtype)
        about = {
            "environment": environment(device=pl_module.device, dtype=dtype),
            "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "step": step_of(trainer),
            "settings": {"tasks": self.tasks} | asdict(self.settings),
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        write_results(output, records, tasks=TASKS, title=title, about=about)

    def _score(self, trainer: Trainer, pl_module: LightningModule, output: Path) -> list[Record]:
        datamodule = datamodule_of(trainer)
        assert isinstance(datamodule, TokenizerOwner)  # checked in setup
        own = slice(trainer.global_rank, None, trainer.world_size)
        work = [each._replace(items=each.items[own]) for each in self._work]
        keeps = trainer.world_size == 1 and trainer.state.fn != TrainerFn.FITTING
        with lent_decoder(pl_module) as decoder, ExitStack() as files:
            subject = EvaluatedModel(decoder, datamodule.tokenizer, self._eos_token_ids(trainer, pl_module))
            if not keeps:
                records: list[Record] = []
                evaluate(subject, work, self.settings, on_record=records.append)
                return records
            weights = weights_hash(pl_module.state_dict(), exit_layer=decoder.num_layers)
            dtype = dtype_name(next(pl_module.parameters()).dtype)
            document = settings_document(subject, work, self.settings, weights=weights, dtype=dtype)
            name = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]
            output.parent.mkdir(parents=True, exist_ok=True)
            journal = files.enter_context(Journal(output.with_suffix(f".{name}.examples.jsonl"), document))
            done = [*journal.records]
            evaluate(subject, work, self.settings, done=done, on_record=journal.add, say=_log.info)
            return [*journal.records.values()]

    def report(self) -> Table | None:
        return self._table


def _metrics(results: Sequence[Result], stage: str) -> dict[str, float]:
    """The scores, and the speedups of what drafts, by the names under which they are logged."""
    logged = {}
    for each in results:
        at: dict[str, Any] = {"exit_layer": each.exit_layer, "drafts": each.strategy == "self_speculative"}
        logged[metric_names.task_score(stage, column(each), each.metric, **at)] = each.score
        if each.speedup is not None:
            logged[metric_names.task_score(stage, column(each), "speedup", **at)] = each.speedup
    return logged
