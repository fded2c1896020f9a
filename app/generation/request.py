"""A request to continue prompts: their texts and tokens, how to decode them, and what comes of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from app.decoding.engine import Decoding, OnStep, decode_batch
from app.decoding.result import DecodingResult, StopReason
from app.decoding.settings import DecodingSettings
from app.decoding.stopping import StopStrings
from app.decoding.strategies import STRATEGIES, Strategy
from app.errors import ConfigError
from app.generation.defaults import choose_decoding
from app.generation.loaded_model import LoadedModel, eos_token_ids, load_draft_decoder
from app.generation.options import GenerationOptions
from app.text.text_stream import continuation
from app.text.text_tokens import prompt_tokens

_log = logging.getLogger(__name__)

_STRIDE = 0x9E3779B97F4A7C15  # odd, as are its low 32 bits, all that a CPU generator looks at


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What came of one prompt; `layerskip generate --json` prints these fields.

    Attributes:
        text: What the new tokens add to the prompt.
        tokens: New token ids.
        num_tokens: How many they are.
        seconds_prefill: From the start to the first new token.
        seconds_decode: From the first new token to the last.
        tokens_per_second: Tokens after the first, each second of decode time; None if there was none.
        acceptance_rate: Accepted / drafted; None if nothing was drafted.
        mean_tokens_per_round: Tokens after the first, each round; None if there was no round.
        rounds: Rounds of draft and verify.
        drafted: Tokens that were drafted.
        accepted: Drafted tokens that the full model kept.
        prompt: The text that was continued.
        stop_reason: Why decoding ended.
        strategy: How it was decoded.
        lossless: Whether this strategy gives the full model's own output.
        exit_layer: Blocks that drafted, or that were run at all; None where the strategy has none.
        num_draft_tokens: Most tokens drafted in a round; None where the strategy drafts nothing.
        fell_back_after: New tokens after which drafting was given up because it did not pay; None if it was not.
    """

    text: str
    tokens: list[int]
    num_tokens: int
    seconds_prefill: float
    seconds_decode: float
    tokens_per_second: float | None
    acceptance_rate: float | None
    mean_tokens_per_round: float | None
    rounds: int
    drafted: int
    accepted: int
    prompt: str
    stop_reason: StopReason
    strategy: Strategy
    lossless: bool
    exit_layer: int | None
    num_draft_tokens: int | None
    fell_back_after: int | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """Prompts to continue with a model.

    Attributes:
        loaded: The model.
        texts: The prompts.
        tokens: Their token ids.
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

    @classmethod
    def of(
        cls, loaded: LoadedModel, texts: Sequence[str], options: GenerationOptions, *, place: str, batch_size: int
    ) -> Request:
        """Complete the options for a model, which may load a draft model.

        Args:
            loaded: The model.
            texts: Prompts, at least one.
            options: As the user gave them.
            place: Where the prompts were written, for error messages; its number follows where there are several.
            batch_size: Prompts to be decoded together.

        Raises:
            ConfigError: A prompt or an option does not fit the model.
        """
        tokens = [
            encode(
                loaded.tokenizer,
                text,
                chat=options.chat,
                place=place if len(texts) == 1 else f"{place} {number}",
                max_length=loaded.decoder.max_length,
            )
            for number, text in enumerate(texts, start=1)
        ]
        stop = None if options.stop is None else StopStrings(loaded.tokenizer, options.stop)
        batch_size = min(batch_size, len(texts))
        strategy, settings = choose_decoding(options.strategy, options.settings(), loaded, batch_size=batch_size)
        settings = replace(
            settings,
            eos_token_ids=eos_token_ids(loaded.model, loaded.tokenizer),
            stop=stop,
            draft_decoder=load_draft_decoder(options.draft_model, loaded, strategies=[strategy]),
        )
        if STRATEGIES[strategy].costs is not None and loaded.model.dtype != torch.float32:
            _log.info(
                "%s: outputs can differ from decoding one token at a time where two tokens tie; layerskip benchmark"
                " measures how often",
                str(loaded.model.dtype).removeprefix("torch."),
            )
        return cls(loaded=loaded, texts=texts, tokens=tokens, strategy=strategy, settings=settings, seed=options.seed)

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

    def decode(self, rows: range, *, on_step: OnStep | None = None) -> list[DecodingResult]:
        """Continue these prompts together. What is drawn for a prompt depends on `seed` and its row alone."""
        with torch.inference_mode():
            return decode_batch(
                self.loaded.decoder,
                [self.tokens[row] for row in rows],
                strategy=self.strategy,
                settings=self.settings,
                generators=self._generators(rows),
                on_step=on_step,
            )

    def decoding(self) -> Decoding:
        """All prompts, to be decoded together by whoever iterates."""
        return Decoding(
            self.loaded.decoder,
            self.tokens,
            strategy=self.strategy,
            settings=self.settings,
            generators=self._generators(range(len(self.tokens))),
        )

    def _generators(self, rows: range) -> list[torch.Generator]:
        seeds = [(self.seed + row * _STRIDE) % 2**64 for row in rows]
        return [torch.Generator(self.loaded.decoder.device).manual_seed(seed) for seed in seeds]

    def generation(self, row: int, result: DecodingResult) -> Generation:
        """What came of a prompt."""
        entry = STRATEGIES[self.strategy]
        return Generation(
            text=continuation(self.loaded.tokenizer, self.tokens[row], result.tokens),
            tokens=result.tokens,
            num_tokens=result.num_tokens,
            seconds_prefill=result.seconds_prefill,
            seconds_decode=result.seconds_decode,
            tokens_per_second=result.tokens_per_second,
            acceptance_rate=result.acceptance_rate,
            mean_tokens_per_round=result.mean_tokens_per_round,
            rounds=result.rounds,
            drafted=result.drafted,
            accepted=result.accepted,
            prompt=self.texts[row],
            stop_reason=result.stop_reason,
            strategy=self.strategy,
            lossless=entry.lossless,
            exit_layer=self.settings.exit_layer if "exit_layer" in entry.needs else None,
            num_draft_tokens=self.settings.num_draft_tokens if "num_draft_tokens" in entry.needs else None,
            fell_back_after=result.fell_back_after,
        )


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
