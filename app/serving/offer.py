"""What a server offers, and how the body of a request becomes prompts and settings within its limits.

Tested by tests/integration/test_serving.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from transformers import RepetitionPenaltyLogitsProcessor

from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings
from app.decoding.stopping import StopStrings
from app.errors import ConfigError, check_range
from app.generation.loaded_model import LoadedModel
from app.generation.prompts import chat_tokens, check_length
from app.serving.answers import RefusedError
from app.serving.bodies import Body
from app.text.text_tokens import prompt_tokens


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a server offers, and within which limits.

    Attributes:
        name: The model's name in requests and answers.
        settings: How the strategy of the server decodes; budget, stop strings and sampling are the request's.
        max_new_tokens: Most new tokens of a prompt.
        max_body_bytes: Largest body of a request.
        key: What clients must send as their API key; None lets everyone in.
    """

    name: str
    loaded: LoadedModel
    settings: DecodingSettings
    max_new_tokens: int
    max_body_bytes: int
    key: str | None = None

    def check_model(self, name: str) -> None:
        """Raise RefusedError unless this is the model's name."""
        if name != self.name:
            told = str(ConfigError("model", got=name, allowed=self.name))
            raise RefusedError(404, told, field="model", code="model_not_found")

    def settings_of(self, body: Body, budget: int) -> DecodingSettings:
        """Complete settings of a request that asks for `budget` new tokens."""
        check_range("max_tokens", budget, low=1, high=self.max_new_tokens, fix="the limit of this server")
        penalty = body.repetition_penalty
        if penalty != 1.0 and self.settings.engine == "static":
            raise ConfigError("repetition_penalty", got=penalty, allowed="1 with the engine of this server, static")
        names = ("temperature", "top_k", "top_p", "min_p") if body.temperature > 0 else ()
        choice = {name: getattr(body, name) for name in names}
        sampling = SamplingSettings(**choice, processor=None if penalty == 1.0 else _penalised(penalty))
        stop = StopStrings(self.loaded.tokenizer, body.stop) if body.stop else None
        return replace(self.settings, max_new_tokens=budget, stop=stop, sampling=sampling)

    def encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Token ids of each prompt; an error names one of several by its index."""
        decoder, encoded = self.loaded.decoder, []
        for index, prompt in enumerate(prompts):
            field = f"prompt.{index}" if len(prompts) > 1 else "prompt"
            ids = prompt_tokens(self.loaded.tokenizer, prompt) if isinstance(prompt, str) else prompt
            check_length(field, ids, max_length=decoder.max_length)
            for token in (min(ids), max(ids)):
                check_range(field, token, low=0, high=decoder.vocab_size - 1, fix="use the model's own tokenizer")
            encoded.append(ids)
        return encoded

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[list[int]]:
        """Token ids of one conversation; ConfigError if no chat template takes it, or it is too long."""
        try:
            ids = chat_tokens(self.loaded.tokenizer, messages)
        except ConfigError as error:
            allowed = "what the model's chat template takes (/v1/completions needs none)"
            raise ConfigError("messages", got=f"{len(messages)} of them", allowed=allowed, fix=error.fix) from error
        check_length("messages", ids, max_length=self.loaded.decoder.max_length)
        return [ids]


@lru_cache(maxsize=64)
def _penalised(penalty: float) -> RepetitionPenaltyLogitsProcessor:
    """The same processor for the same penalty, so that requests that ask for it share batches."""
    return RepetitionPenaltyLogitsProcessor(penalty)
