"""`layerskip export`: any model we can read, as a Hugging Face directory."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from app.checkpoints.integrity import check_bytes
from app.checkpoints.run_record import RunRecord
from app.checkpoints.weights import is_trained_weights, open_trained_weights
from app.cli.parsing.verb_parser import call_verb
from app.errors import ConfigError, check_choice
from app.export.carried_over import carried_defaults, holds
from app.export.directory import ExportSettings, Weights, architecture, exported_dtype, write_pretrained
from app.export.model_card import CardSettings, model_card
from app.export.output_directory import README, check_output_dir, unsigned
from app.generation.loaded_model import DTYPES, Dtype
from app.model_files.decoding_defaults import DecodingDefaults, read_decoding_defaults
from app.model_files.generation_config import trained_generation_config
from app.model_files.open import load_for_decoding
from app.spans.decoder import SUPPORTED_MODEL_TYPES
from app.text.tokenizer_files import check_fits
from app.words import counted

_log = logging.getLogger(__name__)


def export(
    *,
    output_dir: str,
    model: str | None = None,
    ckpt_path: str | None = None,
    dtype: Dtype = "auto",
    max_shard_size: str = "5GB",
    license: str | None = None,  # noqa: A002  # the hub's name for it
    base_model: str | None = None,
    generation_defaults: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model as a Hugging Face directory, which plain transformers loads: config, safetensors, tokenizer, card.

    Args:
        output_dir: Directory to make; it must be new, empty, or an export that nobody added to since. Of the latter,
            what `layerskip tune` stored is kept if it was for these weights.
        model: Lightning checkpoint of a run (file or directory), Hugging Face directory, hub id or .gguf file.
        ckpt_path: The same by another name; exactly one of the two is given.
        dtype: Of the weights; auto keeps those of the checkpoint (float32 for .gguf).
        max_shard_size: Of a file of weights, such as 5GB or 500MB; also about the memory that exporting takes.
        license: For the model card, as the hub names licences: apache-2.0, llama2, other, ...; by default as the card
            says that is replaced, or that of the model the run continued.
        base_model: For the model card, the hub id of the model it was trained from; by default as those cards say, or
            else model.pretrained.
        generation_defaults: What `layerskip tune` found: a directory that it tuned, a generation_config.json, or a file
            with the output of `layerskip tune --json`. Its measurements are left out if the directory holds other
            weights.
        overwrite: Replace whatever model directory there is, all of it.
    """
    field, path = ("model", model) if ckpt_path is None else ("ckpt_path", ckpt_path)
    if path is None or (model is not None and ckpt_path is not None):
        got = "neither" if path is None else "both"
        raise ConfigError("model", got=got, allowed="exactly one of model and ckpt_path, two names for the same")
    check_choice("dtype", dtype, DTYPES)
    directory = check_output_dir(output_dir, overwrite=overwrite)
    card = CardSettings(title=directory.name, license=license, base_model=base_model)
    card = card.completed_from_card(directory, name="the card that was there")
    chosen = ExportSettings(dtype=DTYPES[dtype], max_shard_size=max_shard_size)  # wrong settings before any reading
    loaded, tokenizer, weights, record = _open(path, dtype=chosen.dtype, field=field)
    source = weights or Weights.of(loaded)
    decoding = _decoding(loaded, source, generation_defaults, directory)
    name = _name(exported_dtype(source, chosen.dtype))
    if (own := Path(path) / README).is_file():  # a copy needs no other words than the model's own
        readme = card.relabelled(unsigned(own.read_text("utf-8", errors="replace")))
    else:
        card = card.completed_from_origin(path, record)
        readme = model_card(loaded, record, decoding, dtype=name, card=card)
    settings = replace(chosen, decoding=decoding, readme=readme)
    num_files = write_pretrained(loaded, tokenizer, directory, weights=source, settings=settings)
    files = counted(num_files, "file")
    print(f"{directory}: {type(loaded).__name__}, {loaded.num_parameters():,} parameters, {name}, in {files}")
    said = _name(loaded.config.dtype)
    if weights is not None and dtype == "auto" and said in DTYPES and said != name:
        print(
            f"its weights are {name}, as they were trained; it started from {said}: --dtype {said} makes them so again"
        )
    print(_next_step(decoding, directory, model_type=loaded.config.model_type))


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _open(
    path: str, *, dtype: torch.dtype | None, field: str
) -> tuple[PreTrainedModel, Any, Weights | None, RunRecord | None]:
    """Model, tokenizer, where its weights are read if not from the model itself, and the run that made them."""
    if not is_trained_weights(path):
        return *load_for_decoding(path, dtype=dtype, field=field), None, None
    trained = open_trained_weights(path)
    model = architecture(trained.config, trained_generation_config(trained))
    if trained.tokenizer is None:
        _log.warning("%s holds no tokenizer: copy its files into the directory", path)
    else:
        vocab_size = trained.config.get_text_config().vocab_size
        check_fits(trained.tokenizer, vocab_size=vocab_size, field=field, got=path)
    check_bytes(trained.path)
    weights = Weights(trained.shapes, trained.read)
    return model, trained.tokenizer, weights, RunRecord.of(Path(path), trained.metadata)


def _decoding(model: PreTrainedModel, weights: Weights, given: str | None, directory: Path) -> DecodingDefaults | None:
    """What `layerskip tune` chose: as given, as the model brings it, or as the directory that is replaced held it."""
    if given is not None:
        if (defaults := carried_defaults(model, Path(given), field="generation_defaults")) is None:
            fix = "nothing of the kind is in it"
            raise ConfigError("generation_defaults", got=given, allowed="what layerskip tune stored", fix=fix)
        if not Path(given).is_dir() or holds(Path(given), weights):
            return defaults
        _log.warning("%s holds other weights: what layerskip tune chose is taken, what it measured is not", given)
        return _unmeasured(defaults)
    if (own := read_decoding_defaults(model)) is not None or not directory.exists():
        return own
    try:
        kept = carried_defaults(model, directory, field="output_dir")
    except ConfigError as error:
        _log.warning("what layerskip tune stored in %s does not fit this model and is not kept: %s", directory, error)
        return None
    if kept is None:
        return None
    if not holds(directory, weights):
        _log.warning(
            "what layerskip tune stored in %s was for other weights and is not kept: %s", directory, _said(kept)
        )
        return None
    _log.info("kept from the directory that was there: %s", _said(kept))
    return kept


def _unmeasured(decoding: DecodingDefaults) -> DecodingDefaults:
    strategy, exit_layer, drafts = decoding.strategy, decoding.exit_layer, decoding.num_draft_tokens
    return DecodingDefaults(strategy=strategy, exit_layer=exit_layer, num_draft_tokens=drafts)


def _said(decoding: DecodingDefaults) -> str:
    if decoding.strategy == "autoregressive":
        return "autoregressive, no setting being faster"
    return f"exit_layer {decoding.exit_layer}, num_draft_tokens {decoding.num_draft_tokens}"


def _next_step(decoding: DecodingDefaults | None, directory: Path, *, model_type: str) -> str:
    if model_type not in SUPPORTED_MODEL_TYPES:
        return f"transformers decodes it; layerskip generate and tune know no {model_type}"
    if decoding is None:
        return f"not tuned: layerskip tune --model {directory} --prompts FILE.jsonl finds the fastest exit and drafts"
    if decoding.conditions is None and decoding.measured_speedup is None:
        return f"decoding, as given: {_said(decoding)}; layerskip tune --model {directory} measures what is fastest"
    return f"decoding, as layerskip tune chose: {_said(decoding)}"


def run() -> None:
    """Parse and run the verb."""
    call_verb(export, sys.argv[2:])
