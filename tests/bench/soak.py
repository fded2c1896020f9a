"""`make soak`: does a long run keep its memory, file handles and threads, with validation, decoding and checkpoints?

A tiny model is trained by `layerskip fit` in a process of its own, which counts what it and its data workers hold.
"""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from app.cli.tables import print_table
from app.errors import ConfigError, check_range
from app.tables import Table
from tests.bench.results import run_measurement, run_verb, target_result, write_results
from tests.support.memory import process_status

MEMORY_THRESHOLD = 1.05  # resident memory at the last mark over that at the first
COUNT_THRESHOLD = 0  # more file handles, or threads, at any later mark than at the first
_MARKS = 4
_EVENTS = 16  # validations with decoding, and checkpoints, in a run
_MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_PROC = Path("/proc")
_HERE = "tests.bench.soak"  # also where this file runs as __main__


class HoldingsLog(Callback):
    """Writes down what this process and its children hold, as a JSON list with one object for each mark."""

    def __init__(self, *, every_n_steps: int, output: str) -> None:
        self.every_n_steps, self.output = every_n_steps, Path(output)
        self.marks: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write down what is held, which at every mark includes the memory of one batch."""
        if trainer.global_step % self.every_n_steps == 0:
            self.marks.append({"step": trainer.global_step} | holdings())
            self.output.write_text(json.dumps(self.marks), "utf-8")


def holdings() -> dict[str, float]:
    """Resident MiB, open file handles and threads of this process and all below it."""
    processes = list(_family(_PROC / "self"))
    return {
        "rss_mib": sum(process_status("VmRSS", process) for process in processes) / 2**10,
        "handles": sum(len(list((process / "fd").iterdir())) for process in processes),
        "threads": sum(process_status("Threads", process) for process in processes),
    }


def _family(process: Path) -> Iterator[Path]:
    yield process
    for task in (process / "task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _family(_PROC / child)


def measure_soak(
    *, num_steps: int = 2000, output: str = "build/soak.json", config: str = "configs/quickstart.yaml"
) -> None:
    """Measure what a long run holds after each quarter of it.

    Args:
        num_steps: Optimizer steps; a multiple of 4, the first quarter of which warms up.
        output: The JSON object to write.
        config: The run whose settings count, but for sizes and callbacks.
    """
    check_range("num_steps", num_steps, low=_MARKS)
    if num_steps % _MARKS:
        raise ConfigError("num_steps", got=num_steps, allowed=f"a multiple of {_MARKS}")
    if not _PROC.is_dir():
        raise ConfigError("soak", got="a system without /proc", allowed="Linux")
    with TemporaryDirectory() as folder:
        marks = Path(folder, "marks.json")
        run_verb("fit", *_options(Path(folder), marks, config=config, num_steps=num_steps))
        found: list[dict[str, float]] = json.loads(marks.read_text("utf-8"))
    command = shlex.join(["python", "-m", "tests.bench.soak", f"--num_steps={num_steps}", f"--config={config}"])
    write_results(soak_results(found, command), Path(output))
    rows = [tuple(f"{value:,.0f}" for value in mark.values()) for mark in found]
    print_table(Table("What the run holds", ("step", "resident memory (MiB)", "file handles", "threads"), rows))


def soak_results(marks: list[dict[str, float]], command: str) -> dict[str, dict[str, Any]]:
    """The targets `soak_memory_ratio`, `soak_handles_growth` and `soak_threads_growth`, from two or more marks."""
    first, *later = marks
    growth = {name: max(mark[name] for mark in later) - first[name] for name in ("handles", "threads")}
    memory = target_result(later[-1]["rss_mib"] / first["rss_mib"], MEMORY_THRESHOLD, command, at_most=True)
    counts = {
        f"soak_{name}_growth": target_result(value, COUNT_THRESHOLD, command, at_most=True)
        for name, value in growth.items()
    }
    return {"soak_memory_ratio": memory | {"marks": marks}} | counts


def _options(folder: Path, marks: Path, *, config: str, num_steps: int) -> list[str]:
    every = max(1, num_steps // _EVENTS)
    decoding = {"exit_layers": [2], "num_draft_tokens": [2], "num_prompts": 2, "prompt_length": 8, "max_new_tokens": 8}
    callbacks = [
        {"class_path": "callbacks.ThroughputMonitor"},
        {"class_path": "callbacks.DataMonitor"},
        {"class_path": "callbacks.ExitQualityMonitor"},
        {"class_path": "callbacks.SelfSpeculativeValidation", "init_args": decoding},
        {"class_path": "callbacks.LastCheckpoint", "init_args": {"every_n_train_steps": every}},
        {
            "class_path": f"{_HERE}.{HoldingsLog.__name__}",
            "init_args": {"every_n_steps": num_steps // _MARKS, "output": str(marks)},
        },
    ]
    return [
        *("--config", config, "--allowed_classes+", _HERE),
        *(f"--model.config.init_args.{name}={value}" for name, value in _MODEL.items()),
        *("--data.seq_len=32", "--data.batch_size=2", f"--data.vocab_size={_MODEL['vocab_size']}"),
        *("--data.num_workers=1", "--data.validation_rows=4", f"--data.cache_dir={folder / 'cache'}"),
        *(f"--trainer.max_steps={num_steps}", f"--trainer.val_check_interval={every}"),
        *(f"--trainer.logger.init_args.save_dir={folder}", "--trainer.logger.init_args.name=run"),
        f"--trainer.callbacks={json.dumps(callbacks)}",
    ]


if __name__ == "__main__":
    run_measurement(measure_soak, module="soak")
