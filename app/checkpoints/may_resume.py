"""Decides whether a run may resume from a checkpoint; every refusal is asked for here, or is listed here.

1. Before the trainer opens files, the command line checks that there is a checkpoint (`app.cli.parsing.preflight`,
   `app.cli.train`), that no other run writes to the folder (`run_lock`), and the config (`check_before` below, with
   `resumed_config`).
2. Whoever reads a checkpoint compares its bytes with their checksums (`checkpoint_io`, `integrity`), and finds what
   every checkpoint has (`contents`).
3. Before anything of it is used, `check_resume` asks, in this order:
   whether the model has the same shape (`check_compatible` below);
   whether there is more than weights (`contents.refuse_weights_alone`);
   whether weights, loops, optimizer, schedule and callbacks fit, entry by entry (`states`);
   whether the data is the same (`check_state_dict` of the datamodule: tokenizer, order of rows, position);
   whether the config is the same, unless step 1 has asked, and the optimizer's settings, unless the user insists;
   how many micro-batches a step has (`loop_counts`).
4. A strategy that shards asks whether weights and states are finite once each rank has read its parts (`sharded`).

`validate`, `test` and `predict` ask the same of the weights and the tokenizer, and take nothing else.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedConfig

from app.checkpoints.contents import refuse_weights_alone
from app.checkpoints.loop_counts import count_micro_batches
from app.checkpoints.resumed_config import GivenConfig, changes_optimizer, saved_config
from app.checkpoints.states import Resumable, check_optimizer_settings, check_states
from app.checkpoints.weights import EXIT_BLOCKS_KEY, HF_CONFIG_KEY, LORA_KEY, STATE_DICT, read_plain
from app.errors import CheckpointError
from app.protocols import ResumableData

_SHAPING = (  # the settings of a model that its weights depend on
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


def check_before(path: Path, given: GivenConfig, *, fit: bool) -> None:
    """Compare the configs, before a trainer opens files for a run that is refused by ConfigError or CheckpointError.

    A checkpoint that cannot be read is not refused here: whoever reads all of it compares its checksums, and may take
    the previous one. With `fit` False the run takes only the weights and the data.
    """
    try:
        content = read_plain(path, mmap=True)
        saved_config(content)
    except CheckpointError:
        return
    given.compare(content, fit=fit)


def check_resume(checkpoint: dict[str, Any], module: Resumable) -> None:
    """Refuse to resume, or change the counts of micro-batches in `checkpoint` to those of the run that resumes.

    Args:
        checkpoint: The content of a single file; tensors without memory will do. A strategy that restores the tensors
            itself asks before it does so, and then Lightning asks again with a content that lacks them.
        module: When Lightning loads weights, not changed yet. ConfigError and CheckpointError name what does not fit.
    """
    trainer, given = module.trainer, module.given_config
    assert trainer.state.fn is not None
    fit, whole = trainer.state.fn == TrainerFn.FITTING, STATE_DICT in checkpoint
    check_compatible(module.config, checkpoint)
    if (saved_exits := checkpoint.get(EXIT_BLOCKS_KEY, {})) != module.exit_sources:
        listed = f"exit blocks {saved_exits} (exit layer: the model's blocks that its own began as)"
        differing = f"{listed}, model.exit_blocks gives {module.exit_sources}"
        raise CheckpointError(f"the checkpoint holds {differing}; use the run's own config.yaml")
    if (saved_lora := checkpoint.get(LORA_KEY)) != (given_lora := module.peft and asdict(module.peft)):
        differing = f"adapters {saved_lora}, model.peft gives {given_lora}"
        raise CheckpointError(f"the checkpoint holds {differing}; use the run's own config.yaml")
    if not fit and f"{trainer.state.fn.value}_loop" not in checkpoint.get("loops", {}):
        checkpoint.pop("loops", None)  # the loop of this verb begins at its beginning
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
    given = config.to_dict()
    differing = [
        f"{key} {saved.get(key)!r} (config: {given.get(key)!r})" for key in _SHAPING if saved.get(key) != given.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint holds a model of another shape: {', '.join(differing)}; use the run's own config.yaml"
        )
