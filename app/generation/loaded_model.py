"""Loads models to decode with, on their device. Tested by tests/contract/test_generate.py."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from app.decoding.strategies import STRATEGIES
from app.errors import ConfigError, check_choice, check_range
from app.model.cpu.precision import avoid_emulation
from app.model.quantized import QUANTIZATIONS, Quantization, check_kernel, round_weights
from app.protocols import ExitableDecoder
from app.text.text_tokens import end_token_ids
from app.text.tokenizer_files import check_same_tokens
from app.words import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from app.spans.decoder import SpanDecoder

_log = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DEVICES: tuple[Device, ...] = ("auto", "cpu", "cuda")
_MOST_THREADS = 256  # allowed on a machine with fewer cores; with many more threads, torch crashes


class LoadedModel(NamedTuple):
    """A model to decode with, its tokenizer, and the view on its weights that the engine drives.

    Attributes:
        dtype: The key of DTYPES with which it was loaded; a draft model is loaded with the same.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoder: SpanDecoder
    dtype: str = "auto"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token id that ends a text: those of the generation config, else the tokenizer's."""
        return end_token_ids(self.model.generation_config, self.tokenizer)

    @property
    def weights_type(self) -> str:
        """The type of the weights in words, for instance "bfloat16", or "int4 weights in bfloat16"."""
        name, quantization = dtype_name(self.model.dtype), self.decoder.quantization
        return name if quantization == "none" else f"{quantization} weights in {name}"


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded, as the user says it to each verb that runs one.

    Args:
        dtype: Type of the weights. auto keeps the checkpoint's, or takes float32 on a CPU that would emulate it.
            Lossless decoding is exact in float32.
        device: Device to run on; auto takes a GPU if there is one.
        threads: Number of CPU threads; by default torch's own choice.
        quantization: Run the model with weights of 8 bits (int8), or of 4 with a scale for every 32 (int4): less
            accurate, and faster to decode on a CPU in bfloat16. Drafts and the model that checks them have the same
            weights.
    """

    dtype: Dtype = "auto"
    device: Device = "auto"
    threads: int | None = None
    quantization: Quantization = "none"

    def load(self, model: str, **settings: Any) -> LoadedModel:
        """Load `model`; `settings` are further arguments of `load_decoder`, which names the errors."""
        return load_decoder(model, **asdict(self), **settings)


@dataclass(frozen=True, kw_only=True)
class DraftLoadOptions(LoadOptions):
    """How a model is loaded that may draft.

    Args:
        draft_vocabulary: File of the token ids that drafts are chosen from, of ours or a token map of SGLang; "none"
            for the whole vocabulary. By default, draft_vocabulary.json beside the model.
    """

    draft_vocabulary: str | None = None


def load_decoder(
    model: str,
    *,
    dtype: str,
    device: str,
    threads: int | None = None,
    draft_vocabulary: str | None = None,
    quantization: Quantization = "none",
    as_tuned: bool = True,
    field: str = "model",
) -> LoadedModel:
    """Load a model in eval mode on its device, and join the projections of each block to decode faster.

    Args:
        model: Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file.
        dtype: A key of DTYPES; auto keeps the checkpoint's own (float32 for .gguf), but takes float32 on a CPU that
            would emulate it.
        device: auto takes a GPU if there is one.
        threads: Number of CPU threads that torch uses from now on, at least 1; None leaves torch's own choice.
        draft_vocabulary: File of the token ids that drafts are chosen from; "none" for all. By default, the file beside
            the model, if there is one.
        quantization: Bits to which the weights of all linear layers are rounded. Few positions at a time are multiplied
            with a copy of the weights in so many bits.
        as_tuned: Take of the file beside the model only the first ids, as many as `layerskip tune` stored with it.
        field: Names the setting that `model` comes from in an error.

    Raises:
        ConfigError: There is no such model or device, or the model cannot be driven in spans.
        CheckpointError: A file is damaged or incomplete.
    """
    check_choice("dtype", dtype, DTYPES)
    check_choice("device", device, _DEVICES)
    check_choice("quantization", quantization, QUANTIZATIONS)
    if threads is not None:
        check_range("threads", threads, low=1, high=max(_MOST_THREADS, os.cpu_count() or 1))
        torch.set_num_threads(threads)
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device", got=device, allowed="auto | cpu on this machine")
    # Importing transformers' models takes longer than all checks above.
    from app.model_files.exit_blocks import load_exit_blocks
    from app.model_files.open import load_for_decoding
    from app.spans.decoder import SpanDecoder
    from app.spans.functional_block import join_projections

    weights, tokenizer = load_for_decoding(model, dtype=DTYPES[dtype], field=field)
    weights.to(torch.device("cuda" if has_gpu and device != "cpu" else "cpu"))
    avoid_emulation(weights, field=field, chosen=dtype != "auto")
    exit_blocks = load_exit_blocks(model, weights)
    if quantization != "none":
        _check_can_quantize(weights, quantization)
        round_weights([weights, *exit_blocks.values()], quantization)
    join_projections(weights)
    join_projections(weights, [layer for block in exit_blocks.values() for layer in block.decoder.layers])
    decoder = SpanDecoder(weights, exit_blocks=exit_blocks, quantization=quantization)
    loaded = LoadedModel(weights, tokenizer, decoder, dtype)
    if draft_vocabulary != "none":
        _use_draft_vocabulary(loaded, model, draft_vocabulary, as_tuned=as_tuned)
    return loaded


def _use_draft_vocabulary(loaded: LoadedModel, model: str, given: str | None, *, as_tuned: bool) -> None:
    """Let drafts be chosen from the ids of the given file, or else of the one beside the model, if there is one."""
    from app.model_files.decoding_defaults import read_decoding_defaults
    from app.model_files.draft_vocabulary import DRAFT_VOCABULARY_FILE, first_ids, read_draft_vocabulary

    file = Path(model) / DRAFT_VOCABULARY_FILE if given is None else Path(given)
    if given is None and not os.path.lexists(file):
        return
    vocab_size, ends = loaded.decoder.vocab_size, loaded.eos_token_ids
    token_ids = read_draft_vocabulary(file, vocab_size=vocab_size, ends=ends)
    tuned = read_decoding_defaults(loaded.model) if as_tuned and given is None else None
    size = len(token_ids) if tuned is None else tuned.draft_vocabulary_size or len(token_ids)
    is_whole = tuned is not None and size == vocab_size
    loaded.decoder.use_draft_vocabulary(None if is_whole else first_ids(token_ids, size, ends=ends))


def _check_can_quantize(model: PreTrainedModel, quantization: Quantization) -> None:
    from app.spans.functional_block import FUNCTIONAL_MODEL_TYPES, is_functional

    if not is_functional(model):
        got, allowed = f"{quantization} of {model.config.model_type}", " | ".join(sorted(FUNCTIONAL_MODEL_TYPES))
        raise ConfigError("quantization", got=got, allowed=f"none, or a model of {allowed}")
    if model.dtype != torch.bfloat16:
        got, fix = f"{quantization} in {dtype_name(model.dtype)}", "the kernels are slow in other types"
        raise ConfigError("quantization", got=got, allowed="none, or dtype bfloat16", fix=fix)
    check_kernel(quantization, model.device)


def load_draft_decoder(path: str | None, target: LoadedModel, *, strategies: Sequence[str]) -> ExitableDecoder | None:
    """Load the model at `path` that drafts, on the target's device; return None where no strategy takes one.

    Raises:
        ConfigError: A strategy lacks its model, the model cannot be read, it has other tokens than the target, or it
            is an exit of another model.
    """
    takers = [name for name in strategies if name in STRATEGIES and "draft_decoder" in STRATEGIES[name].needs]
    if not takers:
        if path is not None:
            _log.warning("draft_model=%s has no effect with strategy %s", path, ", ".join(strategies))
        return None
    if path is None:
        raise ConfigError("draft_model", got=None, allowed=f"a model, with strategy {takers[0]}")
    from app.model_files.exit_origin import check_exit_origin

    check_exit_origin(path, target.model, field="draft_model")
    draft = load_decoder(path, dtype=target.dtype, device=target.decoder.device.type, field="draft_model")
    check_same_tokens(target.tokenizer, draft.tokenizer, got=path)
    return draft.decoder
