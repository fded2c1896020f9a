"""Which tokenizer the data of a run are read with: that of the model which is continued, unless another is named."""

from __future__ import annotations

from pydoc import locate
from typing import Any

from app.model_files.open import check_tokenizer_of, open_tokenizer
from datamodules import TextCodeDataModule, TOPv2DataModule


def take_tokenizer_of_model(config: Any) -> None:
    """Where no tokenizer is named, name the model that is continued: it knows the ids of its own alone.

    Args:
        config: Of a verb, as parsed; changed in place.
    """
    pretrained, arguments = config["model"]["pretrained"], _arguments(config)
    if pretrained is not None and arguments is not None and arguments["tokenizer"] is None:
        arguments["tokenizer"] = pretrained


def check_tokenizer(config: Any) -> None:
    """Refuse another model's tokenizer, before a logger opens its files; of other datamodules the module asks later.

    Args:
        config: Of a verb, as parsed, with the tokenizer named.

    Raises:
        ConfigError: The model that is continued has other ids, or the tokenizer cannot be read.
        CheckpointError: The tokenizer is of a checkpoint that is damaged.
    """
    pretrained, arguments = config["model"]["pretrained"], _arguments(config)
    if pretrained is not None and arguments is not None and arguments["tokenizer"] != pretrained:
        tokenizer = open_tokenizer(arguments["tokenizer"], field="tokenizer")
        check_tokenizer_of(pretrained, tokenizer, got=arguments["tokenizer"])


def _arguments(config: Any) -> Any:
    """Those of a datamodule of ours, or of a class made of one; None of others, whose settings mean what they like."""
    data = config["data"]
    kind = locate(data["class_path"]) if data else None
    is_ours = isinstance(kind, type) and issubclass(kind, TextCodeDataModule | TOPv2DataModule)
    return data["init_args"] if is_ours and "tokenizer" in data["init_args"] else None
