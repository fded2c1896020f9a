"""The data targets of `make bench`: does the stream keep up with training, and does resuming cost seconds?"""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app import metric_names
from app.model.cpu.precision import training_precision
from tests.bench.results import run_verb, target_result

RATE_THRESHOLD = 20.0  # times the tokens a second that training consumes
RESUME_THRESHOLD = 5.0  # seconds to the first batch
_BEFORE_RESUMING = 1_000_000  # tokens
_ROWS, _SEQ_LEN, _STEPS = 4, 256, 4
# The shape of SmolLM2-135M, at random: training it is what the stream must keep up with.
_MODEL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def measure_data_targets(folder: Path, *, config: str) -> dict[str, dict[str, Any]]:
    """Measure `data_rate_ratio` and `resume_seconds`.

    Args:
        folder: For the training run whose speed is read off; removed before and after.
        config: The run whose data are streamed.
    """
    data = ["--config", config, f"--data.seq_len={_SEQ_LEN}", f"--data.batch_size={_ROWS}"]
    data += [f"--data.vocab_size={_MODEL['vocab_size']}"]
    data += [f"--model.config.init_args.{name}={value}" for name, value in _MODEL.items()]
    batches = _BEFORE_RESUMING // (_ROWS * _SEQ_LEN)
    command, streamed = run_verb("data", *data, "--num_batches", str(batches), "--check_resume", "--json")
    found = json.loads(streamed)
    trained, tokens_per_second = _training_rate(folder / "data-rate", *data)
    resumed = found["resumed"]
    return {
        "data_rate_ratio": target_result(
            found["tokens_per_second"] / tokens_per_second, RATE_THRESHOLD, f"{command}; {trained}", at_most=False
        ),
        "resume_seconds": target_result(
            resumed["seconds"] if resumed["identical"] else float("inf"), RESUME_THRESHOLD, command, at_most=True
        ),
    }


def _training_rate(folder: Path, *data: str) -> tuple[str, float]:
    """Train a few steps; return the command, and the median tokens a second without those of the first step."""
    shutil.rmtree(folder, ignore_errors=True)
    monitor = [{"class_path": "callbacks.ThroughputMonitor", "init_args": {"every_n_steps": 1}}]
    command, _ = run_verb(
        *("fit", *data, "--early_exit.rotation_interval=8", f"--trainer.precision={training_precision()}"),
        *(f"--trainer.max_steps={_STEPS}", "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=1"),
        *(f"--trainer.callbacks={json.dumps(monitor)}", "--trainer.enable_checkpointing=false"),
        *(f"--trainer.logger.init_args.save_dir={folder.parent}", f"--trainer.logger.init_args.name={folder.name}"),
    )
    events = EventAccumulator(str(folder))
    events.Reload()
    rates = [event.value for event in events.Scalars(metric_names.TOKENS_PER_SECOND)][1:]
    shutil.rmtree(folder)
    return command, statistics.median(rates)
