"""The Python API for decoding: a model that continues prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.errors import ConfigError, check_range
from app.generation.loaded_model import Device, Dtype, LoadedModel, load_decoder
from app.generation.options import GenerationOptions
from app.generation.request import Generation, Request
from app.model.quantized import Quantization
from app.text.text_stream import TextStream


def load(
    path: str | Path, *, dtype: Dtype = "auto", device: Device = "auto", quantization: Quantization = "none"
) -> "Model":
    """Load a model to continue prompts with.

    Args:
        path: Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file.
        dtype: Type of the weights; auto keeps that of the file, but takes float32 on a CPU that would emulate it.
        device: auto takes a GPU if there is one.
        quantization: Weights of 8 or 4 bits to decode with, on a CPU in bfloat16.

    Raises:
        ConfigError: There is no such model or device, or the model cannot exit early.
        CheckpointError: A file is damaged or incomplete.
    """
    return Model(load_decoder(str(path), dtype=dtype, device=device, quantization=quantization, field="path"))


class Model:
    """A model that continues prompts at full depth, from an early exit, or with drafts; `load` makes one.

    Attributes:
        model: The Hugging Face model, in eval mode.
        tokenizer: Its tokenizer.
        num_layers: Number of its blocks; an exit after E of them has `exit_layer` E.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self.model: PreTrainedModel = loaded.model
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.num_layers: int = loaded.decoder.num_layers

    @overload
    def generate(self, prompt: str, *, batch_size: int | None = None, **options: Any) -> Generation: ...

    @overload
    def generate(self, prompt: Sequence[str], *, batch_size: int | None = None, **options: Any) -> list[Generation]: ...

    def generate(
        self, prompt: str | Sequence[str], *, batch_size: int | None = None, **options: Any
    ) -> Generation | list[Generation]:
        """Continue a prompt, or each of a list of prompts.

        Args:
            batch_size: Number of prompts of a list that are decoded together, at least 1; all by default.
            options: The fields of `GenerationOptions`, for instance `strategy`, `exit_layer`, `max_new_tokens`,
                `temperature` and `stop`. What is left open is taken from `layerskip tune` where that was run.

        Raises:
            ConfigError: A prompt or an option does not fit the model.
            KeyboardInterrupt: After Ctrl-C, as app.decoding.engine.DecodingInterrupted with what was decoded.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts:
            raise ConfigError("prompt", got=texts, allowed="a text, or a list of at least one")
        batch_size = len(texts) if batch_size is None else batch_size
        check_range("batch_size", batch_size, low=1)
        request = self._request(texts, options, batch_size=batch_size)
        results = [
            result
            for start in range(0, len(texts), batch_size)
            for result in request.decode(range(start, min(start + batch_size, len(texts))))
        ]
        generations = [request.generation(row, result) for row, result in enumerate(results)]
        return generations[0] if isinstance(prompt, str) else generations

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """Yield the continuation piece by piece, as the full model settles it.

        Options and errors are those of `generate`, and the pieces make up the `text` that it returns. Decoding goes on
        as the iterator is asked for more.
        """
        request = self._request([prompt], options, batch_size=1)
        return self._pieces(request)

    def _request(self, texts: list[str], options: dict[str, Any], *, batch_size: int) -> Request:
        allowed = [field.name for field in fields(GenerationOptions)]
        if unknown := options.keys() - {*allowed}:
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}; the options are {', '.join(allowed)}")
        return Request.of(self._loaded, texts, GenerationOptions(**options), location="prompt", batch_size=batch_size)

    def _pieces(self, request: Request) -> Iterator[str]:
        steps, text = iter(request.decoding(range(1))), TextStream(self.tokenizer, request.tokens[0])
        while True:
            with torch.inference_mode():  # left before each piece is yielded, or the caller's code would run in it
                index_and_step = next(steps, None)
            if index_and_step is None:
                break
            if piece := "".join([text.push(token) for token in index_and_step[1].tokens]):
                yield piece
        if rest := text.rest():
            yield rest
