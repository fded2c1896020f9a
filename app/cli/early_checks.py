"""Refuses a config before Lightning opens the log files. Tested by tests/contract/test_command_line.py."""

import os
from contextlib import suppress
from pathlib import Path, PurePath
from pydoc import locate
from tempfile import TemporaryFile
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from app.config_tree import walk
from app.errors import ConfigError, check_range
from app.model.config_check import check_runs
from app.model.early_exit import EarlyExitModel
from app.model_files.open import check_tokenizer_of, open_tokenizer
from app.training.batch import check_row_length
from app.training.module import LayerSkipModule
from callbacks import EarlyExitCurriculum, ExitQualityMonitor, LayerDropoutCurriculum
from callbacks.decoding_validation import EveryNthValidation
from datamodules import CachedStatesDataModule, TextCodeDataModule, TOPv2DataModule
from datamodules.loading.datamodule import RowDataModule, check_end

_LARGEST = 2**63 - 1  # the largest number that a tensor holds
_MOST_PROCESSES = max(64, os.cpu_count() or 1)  # on a CPU, Lightning starts any number of processes
_RANGES = {  # Lightning accepts values outside of these silently
    "accumulate_grad_batches": (1, 1_000_000),
    "num_sanity_val_steps": (-1, None),
    "gradient_clip_val": (0, None),
    "log_every_n_steps": (0, None),
    "check_val_every_n_epoch": (1, None),
    "min_steps": (0, None),
    "min_epochs": (0, None),
}
_HEADS = ("num_attention_heads", "num_key_value_heads")  # transformers divides by these
_COUNTS_OF_LOGGERS = ("max_queue", "flush_secs")  # TensorBoard's writer computes with these, whatever they are
_PARTS_OF_PATHS = ("name", "version", "sub_dir", "filename")  # settings of loggers and checkpoint callbacks
_SET_UP_TWICE = (LayerDropoutCurriculum, EarlyExitCurriculum, ExitQualityMonitor)  # safe to set up twice


def check_numbers(config: Namespace) -> None:
    """Refuse whole numbers beyond 64 bits anywhere in the config, and models without attention heads."""
    for path, value in walk(config.as_dict()):
        if isinstance(value, int):
            check_range(path, value, low=1 if path.endswith(_HEADS) else -_LARGEST, high=_LARGEST)


def check_trainer_settings(trainer: Namespace, *, verb: str) -> None:
    """Refuse settings that Lightning divides by, accepts silently, or writes outside of their folder for."""
    for name, (low, high) in _RANGES.items():
        if trainer[name] is not None:
            check_range(f"trainer.{name}", trainer[name], low=low, high=high)
    if str(trainer["devices"]).isdecimal() and trainer["accelerator"] != "cuda":
        check_range("trainer.devices", int(trainer["devices"]), low=0, high=_MOST_PROCESSES)
    if trainer["val_check_interval"] in (0, 0.0):
        allowed = "a number of batches, at least 1; a share of an epoch, (0, 1]; or a time, DD:HH:MM:SS"
        fix = "to validate never, set trainer.limit_val_batches 0"
        raise ConfigError("trainer.val_check_interval", got=0, allowed=allowed, fix=fix)
    for name in ("limit_train_batches", "max_epochs") if verb == "fit" else ():
        if trainer[name] in (0, 0.0):
            raise ConfigError(f"trainer.{name}", got=0, allowed="more than 0, or nothing is trained")
    settings = trainer.as_dict()
    for path, value in walk({group: settings[group] for group in ("logger", "callbacks")}, "trainer"):
        *_, owner, name = path.split(".")
        if owner == "init_args" and name in _PARTS_OF_PATHS and isinstance(value, str):
            part = PurePath(value)
            if part.is_absolute() or ".." in part.parts:
                fix = "the folder itself is save_dir of a logger, dirpath of a checkpoint callback"
                raise ConfigError(path, got=value, allowed="a name or path below its folder, without '..'", fix=fix)
        if name in _COUNTS_OF_LOGGERS and not isinstance(value, int | float):
            raise ConfigError(path, got=value, allowed="a number")


def complete_data(config: Namespace) -> None:
    """Name in the config, in place, the continued model, its tokenizer and exits where the data's settings do not."""
    pretrained, corpus, states = config["model"]["pretrained"], _corpus_arguments(config), states_arguments(config)
    if states is not None:
        exits = (config["model"].get("exit_blocks") or {}).get("exits") or {}
        states["pretrained"] = states["pretrained"] or pretrained
        states["exit_layers"] = states["exit_layers"] or sorted(map(int, exits)) or None
        pretrained = states["pretrained"]
    if pretrained is not None and corpus is not None and corpus["tokenizer"] is None:
        corpus["tokenizer"] = pretrained


def check_tokenizer(config: Namespace) -> None:
    """Refuse a tokenizer with other ids than those of the model that is continued.

    Only our own datamodules are asked here; the module asks the others when training starts.
    """
    pretrained, arguments = config["model"]["pretrained"], _corpus_arguments(config)
    if pretrained is not None and arguments is not None and arguments["tokenizer"] != pretrained:
        tokenizer = open_tokenizer(arguments["tokenizer"], field="tokenizer")
        check_tokenizer_of(pretrained, tokenizer, got=arguments["tokenizer"])


def states_arguments(config: Namespace) -> Any:
    """Return the arguments of a CachedStatesDataModule, or None if the data are others."""
    return _arguments(config["data"], CachedStatesDataModule)


def _corpus_arguments(config: Namespace) -> Any:
    """Return the arguments of the datamodule of ours, or of a class made of one, that reads text; None for others."""
    states = states_arguments(config)
    arguments = _arguments(config["data"] if states is None else states["corpus"], TextCodeDataModule, TOPv2DataModule)
    return arguments if arguments is not None and "tokenizer" in arguments else None


def _arguments(data: Any, *kinds: type) -> Any:
    kind = locate(data["class_path"]) if data else None
    return data["init_args"] if isinstance(kind, type) and issubclass(kind, kinds) else None


def refuse_early(trainer: Trainer, module: LayerSkipModule, data: LightningDataModule) -> None:
    """Run the checks of a fit that need neither weights nor rows, in the order in which Lightning will repeat them.

    The module is attached to the trainer. The datamodule is not asked for its tokenizer, which it may have to train.
    """
    module.trainer = trainer
    if isinstance(data, TextCodeDataModule):
        check_end(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EveryNthValidation):
            callback.check_host(module)
        if isinstance(callback, LayerDropoutCurriculum) and (rate := callback.max_dropout_rate) > 0:
            module.check_model_learns("layer_dropout.max_dropout_rate", got=rate, allowed="0")
        if isinstance(callback, EarlyExitCurriculum) and (curriculum := callback.curriculum) != "none":
            module.check_model_learns("early_exit.curriculum", got=curriculum, allowed="none")
        if type(callback) in _SET_UP_TWICE:
            callback.setup(trainer, module, "fit")
    if isinstance(data, RowDataModule):
        check_row_length(data.seq_len, module.config)
    module.check_frozen_model(spread=isinstance(trainer.strategy, ModelParallelStrategy))
    _check_memory(check_model(module), trainer)
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on all ranks, since it is broadcast
    if trainer.is_global_zero:
        _check_folder(folder)
    module.optimizer_over(nn.ParameterList([torch.zeros(1, 1), torch.zeros(1)]))  # a tensor for each of its two groups


def check_model(module: LayerSkipModule) -> PreTrainedModel:
    """Return the module's model without memory; ConfigError if it cannot be built or cut into exits."""
    try:
        model = check_runs(module.config)
    except ConfigError as error:
        if (path := module.pretrained) is None:
            raise
        allowed, fix = "a model that can be built", f"{CONFIG_NAME}: {error}"
        raise ConfigError("pretrained", got=path, allowed=allowed, fix=fix) from error
    EarlyExitModel(model)
    return model


def _check_memory(model: PreTrainedModel, trainer: Trainer) -> None:
    """Refuse a model that does not fit this machine's memory in float32, unless it is built in parts."""
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * num_weights > there and not isinstance(trainer.strategy, ModelParallelStrategy):
        got, allowed = f"{num_weights:,} weights", f"what {there / 1e9:.0f} GB of memory hold, at 4 bytes each"
        raise ConfigError("config", got=got, allowed=allowed, fix="a MeshStrategy never holds the whole model")


def _check_folder(folder: Path) -> None:
    """Try whether files can be made in the run's folder, and remove the folders that this made."""
    new = [above for above in (folder, *folder.parents) if not above.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        allowed = "a folder that can be written to"
        raise ConfigError("trainer.logger", got=str(folder), allowed=allowed, fix=error.strerror or "") from error
    finally:
        for above in new:
            with suppress(OSError):  # another process may use it by now
                above.rmdir()
