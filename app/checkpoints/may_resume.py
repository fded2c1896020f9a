"""May this run go on from that checkpoint? Whatever refuses is asked from here, for the command line and for scripts.

In this order:

1. Before the trainer opens files, where the command line resumes: whether there is a checkpoint, and no other run that
   writes there (`app.cli.parsing.preflight`, `app.cli.train`, `run_lock`); then its config
   (`resumed_config`: `check_before`).
2. As the file is read: its bytes against their checksums, and what every checkpoint has (`checkpoint_io`,
   `contents`). These refuse for all verbs, so whoever reads asks them.
3. Before anything of it is taken, by `check_resume`:
   the shape of the model (`check_compatible`);
   whether there is more than weights (`contents`);
   weights, loops, optimizer, schedule and callbacks, each entry (`states`);
   the data's tokenizer, order of rows and place in the stream (`datamodules.loading.row_order`, `streaming.position`);
   the config, unless that was done before, and the optimizer's settings, unless its user insists on others;
   how many micro-batches a step has (`loop_counts`).
4. At the first step: whether the weights are finite (`divergence`).

`validate`, `test` and `predict` go through the same, but take the weights and the tokenizer alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedConfig

from app.checkpoints.contents import refuse_weights_alone
from app.checkpoints.loop_counts import count_micro_batches
from app.checkpoints.resumed_config import GivenConfig, changes_optimizer
from app.checkpoints.states import Resumable, check_optimizer_settings, check_states
from app.checkpoints.weights import CONTENT_FILE, HF_CONFIG_KEY, STATE_DICT, read_plain
from app.errors import CheckpointError
from app.protocols import ResumableData


class ResumableRun(Resumable, Protocol):
    """Whom a checkpoint is loaded into, and what is known of the run: LayerSkipModule."""

    config: Any  # transformers'
    given_config: GivenConfig | None


def check_before(path: Path, given: GivenConfig, *, fit: bool) -> None:
    """Refuse what the checkpoint's small values tell, before a trainer opens files for a run that is refused.

    A checkpoint that cannot be read is left to who reads all of it, compares its checksums and may fall back.

    Args:
        path: A single file, or a directory.
        given: Config of the verb.
        fit: Whether it goes on with training; otherwise it only takes the weights and the data.

    Raises:
        ConfigError, CheckpointError: Naming what differs.
    """
    try:
        content = read_plain(path / CONTENT_FILE if path.is_dir() else path, mmap=True)
        given.read(content)
    except CheckpointError:
        return
    given.compare(content, fit=fit)


def check_resume(checkpoint: dict[str, Any], module: ResumableRun) -> None:
    """Refuse to go on, or let the checkpoint count micro-batches as the run that goes on does.

    Args:
        checkpoint: The content of a single file, its counts changed in place; `check_states` tells what will do. Where
            a strategy has taken the tensors out, it has asked before, and the rest is asked again.
        module: At the point where Lightning loads weights, not yet changed.

    Raises:
        ConfigError, CheckpointError: Naming what does not fit, and what to do.
    """
    trainer, given = module.trainer, module.given_config
    assert trainer.state.fn is not None
    fit, whole = trainer.state.fn == TrainerFn.FITTING, STATE_DICT in checkpoint
    check_compatible(module.config, checkpoint)
    if not fit and f"{trainer.state.fn.value}_loop" not in checkpoint.get("loops", {}):
        checkpoint.pop("loops", None)  # its loop starts at its beginning
    if fit and whole:
        refuse_weights_alone(trainer.ckpt_path, checkpoint)
    if whole:
        check_states(checkpoint, module)
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, ResumableData) and (name := type(data).__qualname__) in checkpoint:
        data.check_state_dict(checkpoint[name])
    if not fit:
        return
    saved = given.compare(checkpoint, fit=True) if given else None
    if whole and not (given and changes_optimizer(given.allow_changes)):
        check_optimizer_settings(checkpoint, module)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
    if saved is not None or not scheduled:  # a scheduler sets the number later
        count_micro_batches(checkpoint["loops"]["fit_loop"], saved=saved, given=trainer.accumulate_grad_batches)


def check_compatible(config: PreTrainedConfig, checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the settings, if `checkpoint` holds a model of another shape than `config`."""
    saved = checkpoint.get(HF_CONFIG_KEY)
    if saved is None:
        raise CheckpointError(f"the checkpoint was not written by LayerSkipModule (no {HF_CONFIG_KEY!r} in it)")
    current = config.to_dict()
    shaping = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
    )
    differing = [
        f"{key} {saved.get(key)!r} (config: {current.get(key)!r})"
        for key in shaping
        if saved.get(key) != current.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint holds a model of another shape: {', '.join(differing)}; use the run's own config.yaml"
        )
