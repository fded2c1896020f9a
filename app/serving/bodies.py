"""Bodies of requests in the form of OpenAI's API: what is understood, and what is refused by name.

A field that is null counts as not given. Fields of that API that change nothing at a certain value, such as `n` at 1,
may have this value only. Tested by tests/integration/test_serving.py.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from app.errors import ConfigError, shortened

_DEFAULT_MAX_TOKENS = 16  # that of OpenAI's completions
_Zero = Annotated[float, Field(ge=0, le=0)]


class _Strict(BaseModel):  # type: ignore[misc]  # the extra is not always there to be checked against
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")  # type: ignore[untyped-decorator]
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


def _stops(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


class StreamOptions(_Strict):
    """Whether a stream ends with a piece that has the usage and no choice."""

    include_usage: bool = False


class Body(_Strict):
    """What both endpoints take."""

    model: str = ""
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_stops), Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""  # whoever asks, of whom nothing is kept
    n: Literal[1] = 1
    presence_penalty: _Zero = 0
    frequency_penalty: _Zero = 0
    logit_bias: dict[str, float] = Field({}, max_length=0)


def _prompts(given: Any) -> Any:
    """Make a list of prompts of a text, token ids, or a list of either."""
    ids = isinstance(given, list) and given and all(type(each) is int for each in given)
    prompts = [given] if isinstance(given, str) or ids else given
    for prompt in prompts if isinstance(prompts, list) else [None]:
        if not (isinstance(prompt, str) or (isinstance(prompt, list) and all(type(each) is int for each in prompt))):
            raise ValueError("a text, a list of token ids, or a list of either")
    return prompts


class CompletionBody(Body):
    """The body of /v1/completions; several prompts are several choices of the answer."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts), Field(min_length=1)]
    max_tokens: int = Field(_DEFAULT_MAX_TOKENS, ge=1)
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    suffix: Literal[""] = ""


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _joined(given: Any) -> Any:
    return "".join(TextPart.model_validate(part).text for part in given) if isinstance(given, list) else given


class Message(_Strict):
    """A message of a conversation, with its text as one string."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] = False


_PARTS: dict[Any, type[_Strict]] = {"messages": Message, "content": TextPart, "stream_options": StreamOptions}
_PYDANTIC = re.compile(r"^(Value error, |\w+ should (be|have) )| after validation.*$")  # words around what is allowed

AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(kind: type[AnyBody], raw: bytes) -> AnyBody:
    """Read the JSON of a body.

    Raises:
        ConfigError: It is not JSON, or a field is unknown, missing, of the wrong type or out of range.
    """
    try:
        body: AnyBody = kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field, got = ".".join(map(str, first["loc"])) or "body", first["input"]
        got, allowed, fix = got if len(repr(got)) < 100 else shortened(got), _PYDANTIC.sub("", first["msg"]), ""
        match first["type"]:
            case "json_invalid":
                allowed, fix = "a JSON object", first["ctx"]["error"]
            case "extra_forbidden":
                owner = next((_PARTS[name] for name in reversed(first["loc"][:-1]) if name in _PARTS), kind)
                got, allowed = "a field that this server does not know", ", ".join(owner.model_fields)
            case "missing":
                got, allowed = None, "a value, in every request"
        raise ConfigError(field, got=got, allowed=allowed, fix=fix) from error
    return body
