"""Kill -9 at some step, `fit --ckpt_path last`, and the losses are those of a run that nobody killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import write_corpus

STEPS = 60


CONFIG = """
seed_everything: 3
model:
  warmup_steps: 5
  config:
    class_path: transformers.LlamaConfig
    init_args:
      vocab_size: 300
      hidden_size: 16
      intermediate_size: 32
      num_hidden_layers: 4
      num_attention_heads: 2
      max_position_embeddings: 64
layer_dropout: {{max_dropout_rate: 0.5, time_scale: exponential}}
early_exit: {{curriculum: gradual}}
data:
  class_path: datamodules.TextCodeDataModule
  init_args:
    sources: {{code: {{kind: files, path: {root}/corpus}}}}
    seq_len: 24
    batch_size: 2
    vocab_size: 300
    validation_share: 0.2
    cache_dir: {root}/cache
trainer:
  accelerator: cpu
  max_steps: {steps}
  log_every_n_steps: 1
  limit_val_batches: 0
  accumulate_grad_batches: 2
  enable_progress_bar: false
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: {root}, name: run, version: ""}}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{save_top_k: 0, save_last: true, every_n_train_steps: 5, enable_version_counter: false}}
"""


def write_config(root: Path) -> Path:
    write_corpus(root / "corpus")
    path = root / "config.yaml"
    path.write_text(CONFIG.format(root=root, steps=STEPS))
    return path


def command(config: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "app", "fit", "--config", str(config), *extra]


def losses(root: Path) -> dict[int, float]:
    events = EventAccumulator(str(root / "run"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}  # a later event of a step wins


def test_killed_run_resumes_to_the_same_losses(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = tmp_path / "whole"
    whole.mkdir()
    subprocess.run(command(write_config(whole)), check=True, capture_output=True, env=environment)

    killed = tmp_path / "killed"
    killed.mkdir()
    config = write_config(killed)
    with subprocess.Popen(
        command(config), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        last = killed / "run" / "checkpoints" / "last.ckpt"
        deadline = time.monotonic() + 120
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    subprocess.run(command(config, "--ckpt_path", "last"), check=True, capture_output=True, env=environment)
    resumed, expected = losses(killed), losses(whole)
    assert len(expected) == STEPS
    # TensorBoard writes now and then, so what the first process saw last may be missing; what it wrote must agree.
    assert resumed.items() <= expected.items()
    assert set(range(STEPS - 40, STEPS)) <= resumed.keys()
    assert not list((killed / "run" / "checkpoints").glob("*.partial"))
