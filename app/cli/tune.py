"""`layerskip tune`: the fastest lossless way to decode given prompts here. Tested by tests/contract/test_tune.py."""

import json as json_module
import os
import shlex
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from app.benchmark.decoding_costs import costs_line
from app.benchmark.report import environment
from app.cli.parsing.verb_parser import JSON_FLAG, call_verb
from app.cli.tables import print_table
from app.errors import ConfigError
from app.generation.defaults import conditions_of
from app.generation.loaded_model import LoadOptions
from app.generation.prompts import encode_prompts, read_prompts
from app.model_files.decoding_defaults import write_decoding_defaults
from app.model_files.draft_vocabulary import write_draft_vocabulary
from app.model_files.generation_config import read_generation_config
from app.tuning.result import Tuning, exits_table, tuning_as_json, verifications_table
from app.tuning.tune import TuningSettings
from app.tuning.tune import tune as tune_decoder


def tune(
    *,
    model: str,
    prompts: str,
    limit: int = 16,
    loading: LoadOptions,
    draft_vocabulary: str | None = None,
    store: bool = True,
    json: bool = False,
    **options: Any,
) -> None:
    """Find the fastest exit and draft length for these prompts on this machine, and store them with the model.

    Args:
        model: Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file.
        prompts: JSON lines file; each line is an object with a string "prompt". Take texts like those that the model
            will continue.
        limit: Use this many prompts from the start of the file.
        loading: See LoadOptions.
        draft_vocabulary: File of the token ids that drafts are chosen from, of ours or a token map of SGLang; "none"
            for the whole vocabulary. By default, draft_vocabulary.json beside the model. Drafts are considered from
            the whole list, from its first half and quarter, and from all token ids.
        store: Write the choice into generation_config.json of a model directory, where generate finds it, and the draft
            vocabulary beside it if another file was named.
        options: See TuningSettings.
    """
    settings = TuningSettings(eos_token_ids=(), **options)
    texts = read_prompts(prompts, limit=limit)
    loaded = loading.load(model, draft_vocabulary=draft_vocabulary, as_tuned=False)
    directory = _storable(model) if store else None
    tokens = encode_prompts(texts, loaded.tokenizer, max_length=loaded.decoder.max_length)
    with torch.inference_mode():
        settings = replace(settings, eos_token_ids=loaded.eos_token_ids)
        tuning = tune_decoder(loaded.decoder, tokens, settings, conditions=conditions_of(loaded))
    if not json:  # before it is stored, since a full disk must not cost the answer
        _print(tuning)
    size, token_ids, file = tuning.defaults.draft_vocabulary_size, loaded.decoder.draft_vocabulary, None
    if directory is not None and not tuning.shortfall:
        if draft_vocabulary is not None and token_ids is not None and size in range(loaded.decoder.vocab_size):
            write_draft_vocabulary(directory, token_ids)
        file = write_decoding_defaults(directory, tuning.defaults)
    if json:
        where = environment(device=loaded.decoder.device, dtype=loaded.weights_type)
        asked = {"model": model, "prompts": prompts, "limit": limit, "draft_vocabulary": draft_vocabulary}
        said = {"stored": file and str(file), "environment": where, "settings": asked | asdict(settings)}
        print(json_module.dumps(tuning_as_json(tuning) | said))
    else:
        print(f"not stored{_why_not(model, store)}" if file is None else _stored(file, tuning))
        chosen: dict[str, object] = {"strategy": tuning.defaults.strategy, **tuning.defaults.settings}
        if token_ids is not None and size == loaded.decoder.vocab_size:
            chosen["draft_vocabulary"] = "none"
        flags = " ".join(f"--{name} {_as_argument(value)}" for name, value in chosen.items())
        print(f"by hand: layerskip generate --model {model} {flags}")


def _as_argument(value: object) -> str:
    """Write a value as a shell takes it."""
    return shlex.quote(str(list(value))) if isinstance(value, tuple) else str(value)


def _print(tuning: Tuning) -> None:
    print_table(exits_table(tuning))
    print_table(verifications_table(tuning))
    print(f"costs: {costs_line(tuning.costs)}")
    if tuning.draft_heads:
        heads = ", ".join(f"{cost:.2f} with {size}" for size, cost in tuning.draft_heads.items())
        print(f"H_d with fewer ids: {heads}")
    print(f"decision: {tuning.reason}")
    if tuning.advice:
        print(f"advice: {tuning.advice.replace(tuning.limited_by, f'--{tuning.limited_by}')}")


def _storable(model: str) -> Path | None:
    """Return the model directory if `model` is one, checked before the work so that storing does not fail after it."""
    directory = Path(model)
    if not directory.is_dir():
        return None
    read_generation_config(directory)
    if not os.access(directory, os.W_OK):
        fix = "or leave the result unstored with --store false"
        raise ConfigError("model", got=model, allowed="a directory that can be written to", fix=fix)
    return directory


def _stored(file: Path, tuning: Tuning) -> str:
    if tuning.defaults.exit_layer is None:
        return f"stored in {file}: layerskip generate decodes so by default"
    return (
        f"stored in {file}: layerskip generate decodes so by default, and transformers' generate drafts from the same"
        " exit (one prompt at a time; for a batch pass it assistant_early_exit=None)"
    )


def _why_not(model: str, store: bool) -> str:
    if not store:
        return " (store=false)"
    if Path(model).is_dir():
        return ": there is no decision"
    kind = Path(model).suffix if Path(model).is_file() else "hub id"
    return f": a {kind} cannot hold it; layerskip export --model {model} makes a directory that can be tuned"


run = partial(call_verb, tune, by_hand={"json": JSON_FLAG})
