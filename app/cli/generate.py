"""`layerskip generate`: continue one prompt."""

from __future__ import annotations

import json as json_module
import sys
from typing import Literal

import torch
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # in its __all__ by computation
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.cli.parsing import VerbParser
from app.decoding.engine import decode
from app.decoding.result import DecodingResult, Step
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import Strategy
from app.errors import ConfigError, check_range
from app.model.checkpoint import load_for_decoding
from app.model.spans import SpanDecoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def generate(
    *,
    model: str,
    prompt: str,
    strategy: Strategy = "self_speculative",
    exit_layer: int | None = None,
    num_draft_tokens: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: bool = False,
) -> None:
    """Continue a prompt: autoregressively, from an early exit (lossy), or self-speculatively (lossless).

    Args:
        model: Lightning checkpoint of a run, or Hugging Face directory.
        prompt: Text to continue.
        strategy: How to decode.
        exit_layer: Blocks run by early_exit and by self_speculative's drafts; by default a quarter of them.
        num_draft_tokens: Tokens self_speculative drafts in a round; 3 by default.
        max_new_tokens: Budget.
        temperature: 0 is greedy.
        top_k: Sample among the k most likely tokens only.
        top_p: Sample among the most likely tokens of this total probability only.
        seed: Of the sampling.
        dtype: Of the weights; losslessness is exact in float32.
        device: Where to decode; auto takes a GPU if there is one.
        json: Print one JSON object instead of text.
    """
    if not prompt:
        raise ConfigError("prompt", got=prompt, allowed="at least one character")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", got=device, allowed="auto | cpu on this machine")
    check_range("seed", seed, low=0, high=2**63 - 1)
    weights, tokenizer = load_for_decoding(model, dtype=DTYPES[dtype])
    weights.to("cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device)
    decoder = SpanDecoder(weights)
    if strategy != "autoregressive" and exit_layer is None:
        exit_layer = max(1, decoder.num_layers // 4)
    if strategy == "self_speculative" and num_draft_tokens is None:
        num_draft_tokens = 3
    settings = DecodingSettings(
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids(weights, tokenizer),
        exit_layer=exit_layer,
        num_draft_tokens=num_draft_tokens,
        sampling=SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p),
    )
    stream = None if json else TextStream(tokenizer)
    with torch.inference_mode():
        result = decode(
            decoder,
            tokenizer(prompt)["input_ids"],
            strategy=strategy,
            settings=settings,
            generator=torch.Generator(decoder.device).manual_seed(seed),
            on_step=stream,
        )
    if stream is None:
        print(json_module.dumps(to_json(result, text=tokenizer.decode(result.tokens, skip_special_tokens=True))))
    else:
        stream.close()
        print(f"[{strategy}] {summary(result)}", file=sys.stderr)


class TextStream:
    """Prints text as its tokens arrive; a character whose bytes are not all there yet waits."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._tokens, self._shown = tokenizer, list[int](), ""

    def __call__(self, step: Step) -> None:
        """Print what the step adds."""
        self._tokens += step.tokens
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if text.startswith(self._shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(self._shown) :], end="", flush=True)
            self._shown = text

    def close(self) -> None:
        """Print what is left, and end the line."""
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        print(text[len(self._shown) :], flush=True)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a text: the generation config's (one or several), else the tokenizer's."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = tokenizer.eos_token_id if ids is None else ids
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def to_json(result: DecodingResult, *, text: str) -> dict[str, object]:
    """The object `--json` prints; acceptance_rate is null where nothing was drafted."""
    return {
        "text": text,
        "tokens": result.tokens,
        "num_tokens": result.num_tokens,
        "seconds_prefill": result.seconds_prefill,
        "seconds_decode": result.seconds_decode,
        "tokens_per_second": result.tokens_per_second,
        "acceptance_rate": result.acceptance_rate,
        "mean_tokens_per_round": result.mean_tokens_per_round,
        "rounds": result.rounds,
        "drafted": result.drafted,
        "accepted": result.accepted,
    }


def summary(result: DecodingResult) -> str:
    """One line of statistics."""
    parts = [f"{result.num_tokens} tokens", f"stopped by {result.stop_reason}"]
    if result.tokens_per_second is not None:
        parts.append(f"{result.tokens_per_second:.1f} tokens/s after the first")
    if result.acceptance_rate is not None:
        parts.append(f"{result.acceptance_rate:.1%} of {result.drafted} drafted tokens accepted")
        parts.append(f"{result.mean_tokens_per_round:.2f} tokens a round")
    return ", ".join(parts)


def run() -> None:
    """Parse and run the verb."""
    parser = VerbParser(prog="layerskip generate", description=(generate.__doc__ or "").splitlines()[0])
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with these options.")
    parser.add_function_arguments(generate, as_group=False, skip={"json"})
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of text.")
    options = parser.parse_args(sys.argv[2:]).as_dict()
    options.pop("config")
    generate(**options)
