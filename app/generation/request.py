"""A request to continue prompts: their texts and tokens, how to decode, and what to say of each result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from app.decoding.engine import OnStep, decode_batch
from app.decoding.result import DecodingResult
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import STRATEGIES, Strategy
from app.errors import ConfigError
from app.generation.model import LoadedModel
from app.text.text_stream import continuation
from app.text.text_tokens import prompt_tokens

_STRIDE = 0x9E3779B97F4A7C15  # odd, as are its low 32 bits, all that a CPU generator looks at


@dataclass(frozen=True, kw_only=True)
class Request:
    """Prompts to continue.

    Attributes:
        loaded: The model.
        texts: Of the prompts.
        tokens: Of the prompts.
        strategy: How to decode.
        settings: Complete.
        seed: Of the sampling.
    """

    loaded: LoadedModel
    texts: Sequence[str]
    tokens: Sequence[list[int]]
    strategy: Strategy
    settings: DecodingSettings
    seed: int

    @property
    def label(self) -> str:
        """How it is decoded, in a few words; a strategy with another output than the full model's says so."""
        needs, num_layers = STRATEGIES[self.strategy].needs, self.loaded.decoder.num_layers
        parts: list[str] = [self.strategy]
        if "exit_layer" in needs:
            parts.append(f"exit {self.settings.exit_layer} of {num_layers}")
        if "num_draft_tokens" in needs:
            parts.append(f"up to {self.settings.num_draft_tokens} drafts")
        if not STRATEGIES[self.strategy].lossless:
            parts.append("lossy: not the full model's output")
        return ", ".join(parts)

    def decode(self, rows: range, *, on_step: OnStep | None) -> list[DecodingResult]:
        """Continue these prompts together. What is drawn for a prompt depends on `seed` and its row alone."""
        device = self.loaded.decoder.device
        seeds = [(self.seed + row * _STRIDE) % 2**64 for row in rows]
        with torch.inference_mode():
            return decode_batch(
                self.loaded.decoder,
                [self.tokens[row] for row in rows],
                strategy=self.strategy,
                settings=self.settings,
                generators=[torch.Generator(device).manual_seed(seed) for seed in seeds],
                on_step=on_step,
            )

    def as_json(self, row: int, result: DecodingResult) -> dict[str, object]:
        """The object that `--json` prints; rates are null where nothing was drafted or decoded."""
        entry = STRATEGIES[self.strategy]
        return {
            "text": continuation(self.loaded.tokenizer, self.tokens[row], result.tokens),
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
            "prompt": self.texts[row],
            "stop_reason": result.stop_reason,
            "strategy": self.strategy,
            "lossless": entry.lossless,
            "exit_layer": self.settings.exit_layer if "exit_layer" in entry.needs else None,
            "num_draft_tokens": self.settings.num_draft_tokens if "num_draft_tokens" in entry.needs else None,
            "fell_back_after": result.fell_back_after,
        }


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool, place: str, max_length: int) -> list[int]:
    """Token ids of a prompt, 1 to `max_length` - 1 of them: a new one must fit.

    Args:
        tokenizer: Of the model.
        text: The prompt.
        chat: Whether it is what a user says, to be put into the tokenizer's chat template.
        place: Where it was written, for error messages.
        max_length: The model's context.

    Raises:
        ConfigError: It is empty, too long or no Unicode text, or there is no chat template that takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(place, got=text, allowed="Unicode text") from error
    ids: list[int]
    if chat:  # the template says how a conversation begins
        ids = list(tokenizer(_in_template(tokenizer, text), add_special_tokens=False)["input_ids"])
    else:
        ids = prompt_tokens(tokenizer, text)
    if not 1 <= len(ids) < max_length:
        allowed = f"1 to {max_length - 1} tokens, so that a new one fits the model's context"
        raise ConfigError(place, got=f"{len(ids)} tokens" if text else text, allowed=allowed)
    return ids


def _in_template(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    if tokenizer.chat_template is None:
        raise ConfigError("chat", got=True, allowed="false: this tokenizer has no chat template")
    message = {"role": "user", "content": text}
    try:
        return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)  # type: ignore[no-any-return]
    except (TemplateError, ValueError) as error:
        raise ConfigError("chat", got=True, allowed="a template that takes a user's message", fix=str(error)) from error
