"""Answers in the form of OpenAI's API, as the dictionaries whose JSON is sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.decoding.result import DecodingResult, RoundCounts
from app.serving.job import FinishReason


def usage(num_prompt_tokens: int, results: Sequence[DecodingResult]) -> dict[str, Any]:
    """Tokens of a request, and in fields of our own how its drafts fared; these are null where there were none."""
    new, counts = sum(result.num_tokens for result in results), RoundCounts.total(results)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": new,
        "total_tokens": num_prompt_tokens + new,
        "acceptance_rate": counts.acceptance_rate,
        "mean_tokens_per_round": counts.mean_tokens_per_round,
    }


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The objects that answer one request, of the endpoint for chats or of that for completions."""

    identifier: str
    created: int
    model: str
    chat: bool

    def whole(self, texts: Sequence[str], reasons: Sequence[FinishReason], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request that is not streamed, with a choice for each text."""
        choices = [
            {
                "index": index,
                **({"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}),
                "logprobs": None,
                "finish_reason": reason,
            }
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**self._head(streamed=False), "choices": choices, "usage": usage}

    def piece(
        self, index: int, text: str | None, reason: FinishReason | None = None, *, with_usage: bool
    ) -> dict[str, Any]:
        """A part of a streamed answer; without a text, it opens or closes a choice."""
        delta = {} if text is None else {"content": text}
        if self.chat and text is None and reason is None:
            delta = {"role": "assistant", "content": ""}
        choice = {
            "index": index,
            **({"delta": delta} if self.chat else {"text": text or ""}),
            "logprobs": None,
            "finish_reason": reason,
        }
        return {**self._head(streamed=True), "choices": [choice]} | ({"usage": None} if with_usage else {})

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The part of a streamed answer that has the usage and no choice."""
        return {**self._head(streamed=True), "choices": [], "usage": usage}

    def _head(self, *, streamed: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if streamed else "chat.completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.identifier}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


def error_answer(message: str, *, status: int, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The object that tells an error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, message: str, *, field: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.answer = error_answer(message, status=status, field=field, code=code)
