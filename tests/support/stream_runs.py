"""Runs of `layerskip fit` in processes of their own, on a corpus of three kinds of files; killed, and resumed."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import write_corpus

_WAIT_SECONDS = 240  # several times what a busy machine takes


def write_sources(folder: Path) -> dict[str, dict[str, Any]]:
    """A folder of files, a gzipped JSONL and a Parquet file, as `data.sources`."""
    code = write_corpus(folder / "code")
    with gzip.open(folder / "notes.jsonl.gz", "wt", encoding="utf-8") as notes:
        for number in range(90):
            notes.write(json.dumps({"text": f"note {number} says that block {number % 7} may be skipped"}) + "\n")
    books = [f"book {number}: " + f"all {number + 3} exits share one head. " * (number % 5 + 1) for number in range(40)]
    pq.write_table(pa.table({"content": books}), folder / "books.parquet", row_group_size=8)
    return {
        "code": {"kind": "files", "path": str(code), "weight": 2.0},
        "notes": {"kind": "jsonl", "path": str(folder / "notes.jsonl.gz"), "weight": 1.0},
        "books": {"kind": "parquet", "path": str(folder / "books.parquet"), "field": "content", "weight": 0.5},
    }


def write_config(
    folder: Path, sources: dict[str, dict[str, Any]], *, max_steps: int, checkpoint_every: int, **data: Any
) -> Path:
    """Of a tiny model with layer dropout and rotating exits, logging every step."""
    data = {"seq_len": 24, "batch_size": 2, "vocab_size": 300, "validation_share": 0.1} | data
    init_args = {"sources": sources, "cache_dir": str(folder / "cache")} | data
    llama = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    llama |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    saver = {
        "save_top_k": 0,
        "save_last": True,
        "every_n_train_steps": checkpoint_every,
        "enable_version_counter": False,
    }
    config = {
        "seed_everything": 3,
        "model": {"warmup_steps": 5, "config": {"class_path": "transformers.LlamaConfig", "init_args": llama}},
        "layer_dropout": {"max_dropout_rate": 0.5},
        "early_exit": {"curriculum": "rotational", "rotation_interval": 3},
        "data": {"class_path": "datamodules.TextCodeDataModule", "init_args": init_args},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": max_steps,
            "log_every_n_steps": 1,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder), "name": "run", "version": ""},
            },
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver}],
        },
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def start(config: Path, name: str, *options: str) -> subprocess.Popen[str]:
    """Begin `fit` as run `name`; its ranks are one process group."""
    arguments = ["fit", "--config", str(config), "--trainer.logger.init_args.name", name, *options]
    return subprocess.Popen(
        [sys.executable, "-m", "app", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(run: subprocess.Popen[str]) -> str:
    """Wait for a run to end well; what it printed."""
    try:
        printed, _ = run.communicate(timeout=_WAIT_SECONDS)
    finally:
        kill(run)
    assert run.returncode == 0, printed
    return printed


def kill(run: subprocess.Popen[str]) -> None:
    """Kill -9 every process of a run that is still there."""
    try:
        os.killpg(run.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    run.communicate()


def losses(folder: Path) -> dict[int, float]:
    """`train/loss` by step; a later event of a step wins."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}
