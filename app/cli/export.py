"""`layerskip export`: a model as a Hugging Face directory. Tested by tests/contract/test_export.py."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from app.checkpoints.integrity import check_bytes
from app.checkpoints.run_record import RunRecord
from app.checkpoints.weights import is_trained_weights, open_trained_weights
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


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is written, and what is told of it.

    Args:
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

    Raises:
        ConfigError: The dtype is unknown, or adapters are asked for beside an exit.
    """

    exit_layer: int | None = None
    dtype: Dtype = "auto"
    max_shard_size: str = "5GB"
    license: str | None = None
    base_model: str | None = None
    generation_defaults: str | None = None
    draft_vocabulary: str | None = None
    adapter_dir: str | None = None

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        if self.exit_layer is not None and self.adapter_dir is not None:
            allowed = "only for the whole model, without exit_layer"
            raise ConfigError("adapter_dir", got=self.adapter_dir, allowed=allowed)


def export(
    *, output_dir: str, model: str | None = None, ckpt_path: str | None = None, overwrite: bool = False, **options: Any
) -> None:
    """Write a model as a Hugging Face directory, which plain transformers loads: config, safetensors, tokenizer, card.

    Args:
        output_dir: Directory to write. It must be new, empty, or an earlier export to which nothing was added. What
            `layerskip tune` and `layerskip vocabulary` stored in an earlier export is kept if it was made for these
            weights.
        model: Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file.
        ckpt_path: Another name for model; exactly one of the two is given.
        overwrite: Replace the whole directory, whatever model it holds.
        options: See ExportOptions.
    """
    field, path = ("model", model) if ckpt_path is None else ("ckpt_path", ckpt_path)
    if path is None or (model is not None and ckpt_path is not None):
        got = "neither" if path is None else "both"
        raise ConfigError("model", got=got, allowed="exactly one of model and ckpt_path, two names for the same")
    asked = ExportOptions(**options)
    directory = check_output_dir(output_dir, overwrite=overwrite)
    card = CardSettings(title=directory.name, license=asked.license, base_model=asked.base_model)
    card = card.completed_from_card(directory, name="the card that was there")
    settings = ExportSettings(dtype=DTYPES[asked.dtype], max_shard_size=asked.max_shard_size)  # checked before reading
    opened = _open(path, dtype=settings.dtype, field=field)
    adapter = asked.adapter_dir and check_adapter_dir(asked.adapter_dir, opened.metadata, beside=directory)
    if asked.exit_layer is None:
        exported = _whole(opened, card, settings.dtype)
    else:
        exported = _exit_alone(opened, card, asked.exit_layer)
    decoding, vocabulary = _drafting(opened, exported, asked, directory)
    name = dtype_name(exported_dtype(exported.weights, settings.dtype))
    settings = replace(settings, decoding=decoding, readme=exported.readme(decoding, dtype=name))
    beside = exported.beside | vocabulary
    num_files = write_pretrained(
        exported.model, opened.tokenizer, directory, weights=exported.weights, settings=settings, beside=beside
    )
    if adapter:
        base = exported.card.base_model or (opened.record and opened.record.pretrained)
        base = base if isinstance(base, str) else None
        write_adapter(exported.model, exported.weights, opened.metadata, adapter, base=base)
    size = f"{exported.model.num_parameters():,} parameters, {name}, in {counted(num_files, 'file')}"
    print(f"{directory}: {type(exported.model).__name__}, {size}")
    start = dtype_name(exported.model.config.dtype)
    if opened.record is not None and asked.dtype == "auto" and start in DTYPES and start != name:
        print(f"its weights are {name}, as they were trained; it started from {start}: --dtype {start} converts them")
    if asked.exit_layer is not None:
        print(f"it drafts: layerskip generate --model {path} --strategy draft_model --draft_model {directory}")
    else:
        print(_next_step(decoding, directory, model_type=exported.model.config.model_type))


class _Opened(NamedTuple):
    """What lies at the user's path."""

    path: str
    model: PreTrainedModel  # on the meta device if a run trained it
    tokenizer: Any
    weights: Weights
    record: RunRecord | None = None  # of the run that trained it

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the run's checkpoint says beside weights."""
        return {} if self.record is None else self.record.metadata


class _Exported(NamedTuple):
    """What is written: the whole model, or the model that an exit of it is."""

    model: PreTrainedModel
    weights: Weights
    card: CardSettings
    beside: dict[str, bytes]  # further files, by name
    exits: StoredExitBlocks | None = None
    record: RunRecord | None = None  # of the run that trained the whole model
    copied_readme: str | None = None  # of a model that is copied with its card

    def readme(self, decoding: DecodingDefaults | None, *, dtype: str) -> str:
        """Write the model card, or relabel the one that is kept."""
        if self.copied_readme is not None:
            return self.card.relabelled(self.copied_readme)
        return model_card(self.model, self.record, decoding, dtype=dtype, card=self.card)


def _whole(opened: _Opened, card: CardSettings, dtype: torch.dtype | None) -> _Exported:
    """Return the whole model with its exit blocks."""
    exits, beside = _exit_blocks(opened), dict[str, bytes]()
    if exits is not None:
        state = {name: opened.weights.read(name).to(dtype) for name in opened.weights.shapes}
        beside[EXIT_BLOCKS_FILE] = exits.as_file(state, dtype=dtype)
    readme, copied = Path(opened.path) / README, None
    if readme.is_file():
        copied = unsigned(readme.read_text("utf-8", errors="replace"))
    else:
        card = card.completed_from_origin(opened.path, opened.record)
    return _Exported(opened.model, opened.weights, card, beside, exits, opened.record, copied)


def _exit_alone(opened: _Opened, card: CardSettings, exit_layer: int) -> _Exported:
    """Return the model of the blocks that run up to the exit, its own among them."""
    path, record = opened.path, opened.record
    card = card.completed_from_card(Path(path), name=f"the card of {path}").completed_from_origin(path, record)
    first, weights, origin = first_blocks(opened.model, opened.weights, _exit_blocks(opened), exit_layer=exit_layer)
    blocks = _blocks_in_words(first, exit_layer, opened.model.config.get_text_config().num_hidden_layers)
    return _Exported(first, weights, card.of_exit(path, record, blocks=blocks), {EXIT_ORIGIN_FILE: origin})


def _drafting(
    opened: _Opened, exported: _Exported, asked: ExportOptions, directory: Path
) -> tuple[DecodingDefaults | None, dict[str, bytes]]:
    """Choose the decoding defaults, and the draft vocabulary, whose file is returned by its name if there is one."""
    model, weights = exported.model, exported.weights
    if exported.exits is not None:
        weights = weights.with_others(exported.exits.state)
    decoding = chosen_defaults(model, weights, given=asked.generation_defaults, replaced=directory)
    source = opened.path if asked.exit_layer is None else None  # the whole model's drafts are not its exit's
    token_ids = chosen_vocabulary(
        model, opened.tokenizer, weights, given=asked.draft_vocabulary, source=source, replaced=directory
    )
    decoding = fitting_vocabulary(decoding, token_ids, vocab_size=model.config.get_text_config().vocab_size)
    return decoding, {} if token_ids is None else {DRAFT_VOCABULARY_FILE: draft_vocabulary_file(token_ids)}


def _blocks_in_words(first: PreTrainedModel, exit_layer: int, num_layers: int) -> str:
    """Say which blocks of a model of `num_layers` make up the model that its exit is."""
    blocks = f"the first {exit_layer} of the {num_layers} blocks"
    if own_blocks := first.config.num_hidden_layers - exit_layer:
        blocks += f", and the {counted(own_blocks, 'block')} that the exit has of its own,"
    return blocks


def _exit_blocks(opened: _Opened) -> StoredExitBlocks | None:
    """Return the exit blocks that are stored with a model; CheckpointError if they are another model's."""
    stored = stored_exit_blocks(opened.path)
    if stored is not None and stored.hashes is not None:
        load_exit_blocks(opened.path, opened.model)
    return stored


def _open(path: str, *, dtype: torch.dtype | None, field: str) -> _Opened:
    """Open a model with its tokenizer; of a run's checkpoint, read no weights yet."""
    if not is_trained_weights(path):
        loaded, tokenizer = load_for_decoding(path, dtype=dtype, field=field)
        return _Opened(path, loaded, tokenizer, Weights.of(loaded, path))
    trained = open_trained_weights(path)
    model = architecture(trained.config, trained_generation_config(trained))
    if trained.tokenizer is None:
        _log.warning("%s holds no tokenizer: copy its files into the directory", path)
    else:
        vocab_size = trained.config.get_text_config().vocab_size
        check_fits(trained.tokenizer, vocab_size=vocab_size, field=field, got=path)
    check_bytes(trained.path)
    weights = Weights(trained.shapes, trained.read, trained.path)
    return _Opened(path, model, trained.tokenizer, weights, RunRecord.of(Path(path), trained.metadata))


def _next_step(decoding: DecodingDefaults | None, directory: Path, *, model_type: str) -> str:
    if model_type not in SUPPORTED_MODEL_TYPES:
        return f"transformers decodes it; layerskip generate and tune know no {model_type}"
    if decoding is None:
        return f"not tuned: layerskip tune --model {directory} --prompts FILE.jsonl finds the fastest exit and drafts"
    if decoding.conditions is None and decoding.measured_speedup is None:
        return f"decoding, as given: {named(decoding)}; layerskip tune --model {directory} measures what is fastest"
    return f"decoding, as layerskip tune chose: {named(decoding)}"
