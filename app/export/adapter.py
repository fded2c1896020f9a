"""Writes the LoRA adapters of a run in peft's own format, not merged. Tested by tests/integration/test_lora.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from app.checkpoints.weights import ADAPTERS_KEY, LORA_KEY
from app.errors import ConfigError
from app.export.directory import Weights
from app.export.output_directory import check_output_dir, whole_or_absent
from app.model.lora import LoraSettings, check_has_peft, norms_of, targets_of

_README = """---
library_name: peft
---

# {title}

A LoRA adapter for {base}, trained with layer dropout and early-exit loss: `PeftModel.from_pretrained(base, "{title}")`.
"""


def check_adapter_dir(adapter_dir: str, metadata: Mapping[str, Any], *, beside: Path) -> Path:
    """The absolute path of the directory, apart from `beside`, that of the merged model.

    ConfigError if it is not, or cannot be written, or the checkpoint's `metadata` tells of no adapters.
    """
    field = "adapter_dir"
    if LORA_KEY not in metadata:
        raise ConfigError(field, got=adapter_dir, allowed="null for a model without LoRA adapters of its own")
    check_has_peft(field, got=adapter_dir)
    directory = check_output_dir(adapter_dir, field=field)
    if directory == beside or directory in beside.parents or beside in directory.parents:
        raise ConfigError(field, got=adapter_dir, allowed="a directory beside output_dir")
    return directory


def write_adapter(
    model: PreTrainedModel, weights: Weights, metadata: Mapping[str, Any], directory: Path, *, base: str | None
) -> None:
    """Write adapter_config.json, adapter_model.safetensors and README.md, as peft loads them, or nothing.

    `weights` are those of the merged `model`; its norms are written if they were trained. `metadata` is the
    checkpoint's, with LORA_KEY and ADAPTERS_KEY, and `base` names the model that the adapters are for. CheckpointError
    if the directory cannot be written.
    """
    from peft import LoraConfig

    settings = LoraSettings(**metadata[LORA_KEY])
    norms = norms_of(model) if settings.train_norms else {}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=targets_of(model, settings),
        modules_to_save=sorted({name.rpartition(".")[2] for name in norms}) or None,
    )
    tensors = {name.replace(".default.", "."): adapter for name, adapter in metadata[ADAPTERS_KEY].items()}
    own = [f"{name}.{kind}" for name, norm in norms.items() for kind, _ in norm.named_parameters(recurse=False)]
    tensors |= {name: weights.read(name) for name in own}
    with whole_or_absent(
        directory, readme=_README.format(base=base or "the model that the run began with", title=directory.name)
    ) as folder:
        config.save_pretrained(str(folder))
        named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
