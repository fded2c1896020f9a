"""Prompts to continue with a model, and what came of each. Tested by tests/contract/test_generate.py."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from app.decoding.engine import Decoding, OnStep
from app.decoding.result import DecodingResult
from app.decoding.settings import DecodingSettings
from app.decoding.stopping import StopStrings
from app.decoding.strategies import STRATEGIES, Strategy, is_lossless
from app.generation.defaults import choose_decoding
from app.generation.loaded_model import LoadedModel, load_draft_decoder
from app.generation.options import GenerationOptions
from app.generation.prompts import encode_prompts
from app.text.text_stream import continuation
from app.words import dtype_name

_log = logging.getLogger(__name__)

_STRIDE = 0x9E3779B97F4A7C15  # odd, and so are its low 32 bits, which are all that a CPU generator looks at


def seed_of(seed: int, row: int) -> int:
    """The seed of the random stream of the prompt at index `row`; that of the first prompt is `seed` itself."""
    return (seed + row * _STRIDE) % 2**64


# The fields that `layerskip generate --json` prints.
_PRINTED = (
    *("text", "tokens", "num_tokens", "seconds_prefill", "seconds_decode", "tokens_per_second", "acceptance_rate"),
    *("mean_tokens_per_round", "rounds", "drafted", "accepted", "prompt", "stop_reason", "strategy", "lossless"),
    *("exit_layer", "num_draft_tokens", "fell_back_after", "n_gram_match", "drafted_by_n_gram", "accepted_by_n_gram"),
    *("drafted_by_exit", "accepted_by_exit"),
)


@dataclass(frozen=True, kw_only=True)
class Generation(DecodingResult):
    """What came of one prompt: the new tokens, their text, and how they were decoded.

    Attributes:
        prompt: The text that was continued.
        text: What the new tokens add to the prompt.
        lossless: Whether this is the full model's own output.
        exit_layer: Number of blocks that drafted, or that were run at all; None where the strategy has no exit.
        num_draft_tokens: Largest number of tokens drafted in a round; None where the strategy drafts nothing.
        n_gram_match: Fewest latest tokens that must have occurred before for n-grams to draft; None where they do not.
    """

    prompt: str
    text: str
    strategy: Strategy
    lossless: bool
    exit_layer: int | None
    num_draft_tokens: int | None
    n_gram_match: int | None

    def as_dict(self) -> dict[str, Any]:
        """The fields that `layerskip generate --json` prints."""
        return {name: getattr(self, name) for name in _PRINTED}


def chosen_settings(
    loaded: LoadedModel, options: GenerationOptions, *, batch_size: int
) -> tuple[Strategy, DecodingSettings]:
    """Complete the options for a model; load the draft model if one is needed.

    Raises:
        ConfigError: An option does not fit the model.
    """
    stop = None if options.stop is None else StopStrings(loaded.tokenizer, options.stop)
    strategy, settings = choose_decoding(
        options.strategy, options.settings(), loaded, batch_size=batch_size, n_grams=options.n_gram_match != 0
    )
    if STRATEGIES[strategy].costs is not None and loaded.model.dtype != torch.float32:
        _log.info(
            "%s: where two tokens tie, the output can differ from decoding one token at a time; layerskip"
            " benchmark measures how often",
            dtype_name(loaded.model.dtype),
        )
    draft_decoder = load_draft_decoder(options.draft_model, loaded, strategies=[strategy])
    return strategy, replace(settings, eos_token_ids=loaded.eos_token_ids, stop=stop, draft_decoder=draft_decoder)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Prompts to continue with a model, by a strategy and with complete settings."""

    loaded: LoadedModel
    texts: Sequence[str]
    tokens: Sequence[list[int]]
    strategy: Strategy
    settings: DecodingSettings
    seed: int

    @classmethod
    def of(
        cls, loaded: LoadedModel, texts: Sequence[str], options: GenerationOptions, *, location: str, batch_size: int
    ) -> "Request":
        """Encode the prompts and complete the options for a model; load the draft model if one is needed.

        An error names the prompts by `location`. `batch_size` prompts will be decoded together.
        """
        max_length = loaded.decoder.max_length
        tokens = encode_prompts(texts, loaded.tokenizer, max_length=max_length, chat=options.chat, location=location)
        batch_size = min(batch_size, len(texts))
        strategy, settings = chosen_settings(loaded, options, batch_size=batch_size)
        return cls(loaded=loaded, texts=texts, tokens=tokens, strategy=strategy, settings=settings, seed=options.seed)

    @property
    def label(self) -> str:
        """The strategy and its settings in a few words, with a warning if it is lossy."""
        needs, num_layers = STRATEGIES[self.strategy].needs, self.loaded.decoder.num_layers
        parts: list[str] = [self.strategy]
        if "exit_layer" in needs:
            exits = self.settings.candidate_exits
            parts.append(f"{'exits' if exits[1:] else 'exit'} {' | '.join(map(str, exits))} of {num_layers}")
        if "num_draft_tokens" in needs:
            parts.append(f"up to {self.settings.num_draft_tokens} drafts")
        if self._n_gram_match is not None:
            parts.append(f"n-grams of {self._n_gram_match} and more")
        if not self._is_lossless:
            parts.append("lossy: not the full model's output")
        return ", ".join(parts)

    @property
    def _n_gram_match(self) -> int | None:
        return None if STRATEGIES[self.strategy].costs is None else self.settings.n_gram_match

    @property
    def _is_lossless(self) -> bool:
        num_layers = self.loaded.decoder.num_layers
        return is_lossless(self.strategy, exit_layer=self.settings.exit_layer, num_layers=num_layers)

    def decode(self, rows: range, *, on_step: OnStep | None = None) -> list[DecodingResult]:
        """Continue the prompts of these indices together."""
        with torch.inference_mode():
            return self.decoding(rows).finish(on_step)

    def decoding(self, rows: range) -> Decoding:
        """A decoding of the prompts of these indices together, which runs as its caller iterates over it.

        A prompt's random stream depends on seed and index alone.
        """
        decoder = self.loaded.decoder
        return Decoding(
            decoder,
            [self.tokens[row] for row in rows],
            strategy=self.strategy,
            settings=self.settings,
            generators=[torch.Generator(decoder.device).manual_seed(seed_of(self.seed, row)) for row in rows],
        )

    def generation(self, row: int, result: DecodingResult) -> Generation:
        """Put together what a user is told of the prompt at index `row`."""
        entry = STRATEGIES[self.strategy]
        return Generation(
            **vars(result),
            prompt=self.texts[row],
            text=continuation(self.loaded.tokenizer, self.tokens[row], result.tokens),
            strategy=self.strategy,
            lossless=self._is_lossless,
            exit_layer=self.settings.exit_layer if "exit_layer" in entry.needs else None,
            num_draft_tokens=self.settings.num_draft_tokens if entry.has_drafter else None,
            n_gram_match=self._n_gram_match,
        )
