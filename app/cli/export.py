"""`layerskip export`: a model as a Hugging Face directory. Tested by tests/contract/test_export.py."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from app.checkpoints.integrity import check_bytes
from app.checkpoints.run_record import RunRecord
from app.checkpoints.weights import is_trained_weights, open_trained_weights
from app.cli.parsing.verb_parser import call_verb
from app.errors import ConfigError, check_choice
from app.export.adapter import check_adapter_dir, write_adapter
from app.export.carried_over import chosen_defaults, chosen_vocabulary, fitting_vocabulary, named
from app.export.directory import ExportSettings, Weights, architecture, exported_dtype, write_pretrained
from app.export.first_blocks import first_blocks
from app.export.model_card import CardSettings, model_card
from app.export.output_directory import README, check_output_dir, unsigned
from app.generation.loaded_model import DTYPES, Dtype
from app.model_files.decoding_defaults import DecodingDefaults
from app.model_files.draft_vocabulary import DRAFT_VOCABULARY_FILE, draft_vocabulary_file
from app.model_files.exit_blocks import EXIT_BLOCKS_FILE, StoredExitBlocks, load_exit_blocks, stored_exit_blocks
from app.model_files.exit_origin import EXIT_ORIGIN_FILE
from app.model_files.generation_config import trained_generation_config
from app.model_files.open import load_for_decoding
from app.spans.decoder import SUPPORTED_MODEL_TYPES
from app.text.tokenizer_files import check_fits
from app.words import counted, dtype_name

_log = logging.getLogger(__name__)


def export(
    *,
    output_dir: str,
    model: str | None = None,
    ckpt_path: str | None = None,
    exit_layer: int | None = None,
    dtype: Dtype = "auto",
    max_shard_size: str = "5GB",
    license: str | None = None,  # noqa: A002  # the hub's name for it
    base_model: str | None = None,
    generation_defaults: str | None = None,
    draft_vocabulary: str | None = None,
    adapter_dir: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model as a Hugging Face directory, which plain transformers loads: config, safetensors, tokenizer, card.

    Args:
        output_dir: Directory to write. It must be new, empty, or an earlier export to which nothing was added. What
            `layerskip tune` and `layerskip vocabulary` stored in an earlier export is kept if it was made for these
            weights.
        model: Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file.
        ckpt_path: Another name for model; exactly one of the two is given.
        exit_layer: Write only the first so many blocks, 1..L-1, and the exit's own where it has any, with final norm
            and head, as a model of its own: it says what the exit says, and drafts for the whole model in any program.
        dtype: Type of the weights; auto keeps that of the checkpoint (float32 for .gguf).
        max_shard_size: Largest size of a file of weights, such as 5GB or 500MB. Exporting takes about this much memory.
        license: Licence for the model card, as the hub names it: apache-2.0, llama2, other, ... By default, that of the
            card that is replaced, or of the model that the run continued.
        base_model: Hub id, for the model card, of the model that was trained. By default, as for license, else
            model.pretrained.
        generation_defaults: What `layerskip tune` found: a directory that it tuned, a generation_config.json, or a file
            with the output of `layerskip tune --json`. Measurements on other weights are left out.
        draft_vocabulary: File of the token ids that drafts are chosen from, of ours or a token map of SGLang. By
            default, that beside the model, or that of an earlier export of these weights; with exit_layer, all ids.
        adapter_dir: Another directory, for the adapters of a run with LoRA in peft's own format. In output_dir they are
            merged in any case.
        overwrite: Replace the whole directory, whatever model it holds.
    """
    field, path = ("model", model) if ckpt_path is None else ("ckpt_path", ckpt_path)
    if path is None or (model is not None and ckpt_path is not None):
        got = "neither" if path is None else "both"
        raise ConfigError("model", got=got, allowed="exactly one of model and ckpt_path, two names for the same")
    check_choice("dtype", dtype, DTYPES)
    if exit_layer is not None and adapter_dir is not None:
        raise ConfigError("adapter_dir", got=adapter_dir, allowed="only for the whole model, without exit_layer")
    directory = check_output_dir(output_dir, overwrite=overwrite)
    card = CardSettings(title=directory.name, license=license, base_model=base_model)
    card = card.completed_from_card(directory, name="the card that was there")
    chosen = ExportSettings(dtype=DTYPES[dtype], max_shard_size=max_shard_size)  # checked before anything is read
    loaded, tokenizer, weights, record = _open(path, dtype=chosen.dtype, field=field)
    source = weights or Weights.of(loaded, path)
    metadata = {} if record is None else record.metadata
    adapter = adapter_dir and check_adapter_dir(adapter_dir, metadata, beside=directory)
    exits = stored_exit_blocks(path)
    beside = {} if exits is None else _exit_blocks(exits, path, loaded, source, chosen.dtype)
    own = Path(path) / README
    if exit_layer is not None:
        card = card.completed_from_card(own.parent, name=f"the card of {path}").completed_from_origin(path, record)
        num_layers = loaded.config.get_text_config().num_hidden_layers
        loaded, source, origin = first_blocks(loaded, source, exits, exit_layer=exit_layer)
        card = card.of_exit(path, record, blocks=_blocks_in_words(loaded, exit_layer, num_layers))
        exits, beside, record = None, {EXIT_ORIGIN_FILE: origin}, None
    every = source if exits is None else source.with_others(exits.state)
    decoding = chosen_defaults(loaded, every, given=generation_defaults, replaced=directory)
    known = path if exit_layer is None else None  # the whole model's drafts are not this one's
    token_ids = chosen_vocabulary(loaded, tokenizer, every, given=draft_vocabulary, source=known, replaced=directory)
    decoding = fitting_vocabulary(decoding, token_ids, vocab_size=loaded.config.get_text_config().vocab_size)
    if token_ids is not None:
        beside[DRAFT_VOCABULARY_FILE] = draft_vocabulary_file(token_ids)
    name = dtype_name(exported_dtype(source, chosen.dtype))
    if exit_layer is None and own.is_file():  # the card of a model that is copied is kept
        readme = card.relabelled(unsigned(own.read_text("utf-8", errors="replace")))
    else:
        card = card.completed_from_origin(path, record) if exit_layer is None else card
        readme = model_card(loaded, record, decoding, dtype=name, card=card)
    settings = replace(chosen, decoding=decoding, readme=readme)
    num_files = write_pretrained(loaded, tokenizer, directory, weights=source, settings=settings, beside=beside)
    if adapter:
        base = card.base_model or (record and record.pretrained)
        write_adapter(loaded, source, metadata, adapter, base=base if isinstance(base, str) else None)
    files = counted(num_files, "file")
    print(f"{directory}: {type(loaded).__name__}, {loaded.num_parameters():,} parameters, {name}, in {files}")
    start = dtype_name(loaded.config.dtype)
    if weights is not None and dtype == "auto" and start in DTYPES and start != name:
        print(f"its weights are {name}, as they were trained; it started from {start}: --dtype {start} converts them")
    if exit_layer is not None:
        print(f"it drafts: layerskip generate --model {path} --strategy draft_model --draft_model {directory}")
    else:
        print(_next_step(decoding, directory, model_type=loaded.config.model_type))


def _blocks_in_words(first: PreTrainedModel, exit_layer: int, num_layers: int) -> str:
    """Say which blocks of a model of `num_layers` make up the model that its exit is."""
    blocks = f"the first {exit_layer} of the {num_layers} blocks"
    if own_blocks := first.config.num_hidden_layers - exit_layer:
        blocks += f", and the {counted(own_blocks, 'block')} that the exit has of its own,"
    return blocks


def _exit_blocks(
    stored: StoredExitBlocks, path: str, model: PreTrainedModel, weights: Weights, dtype: torch.dtype | None
) -> dict[str, bytes]:
    """Return the file of exit blocks by name; CheckpointError if they are another model's."""
    if stored.hashes is not None:
        load_exit_blocks(path, model)
    state = {name: weights.read(name).to(dtype) for name in weights.shapes}
    return {EXIT_BLOCKS_FILE: stored.as_file(state, dtype=dtype)}


def _open(
    path: str, *, dtype: torch.dtype | None, field: str
) -> tuple[PreTrainedModel, Any, Weights | None, RunRecord | None]:
    """Return the model and its tokenizer; and of a run's checkpoint, the weights and the record of the run."""
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
    weights = Weights(trained.shapes, trained.read, trained.path)
    return model, trained.tokenizer, weights, RunRecord.of(Path(path), trained.metadata)


def _next_step(decoding: DecodingDefaults | None, directory: Path, *, model_type: str) -> str:
    if model_type not in SUPPORTED_MODEL_TYPES:
        return f"transformers decodes it; layerskip generate and tune know no {model_type}"
    if decoding is None:
        return f"not tuned: layerskip tune --model {directory} --prompts FILE.jsonl finds the fastest exit and drafts"
    if decoding.conditions is None and decoding.measured_speedup is None:
        return f"decoding, as given: {named(decoding)}; layerskip tune --model {directory} measures what is fastest"
    return f"decoding, as layerskip tune chose: {named(decoding)}"


run = partial(call_verb, export)
