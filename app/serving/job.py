"""One prompt that a server continues: what is asked, what is told while it runs, and what came of it.

Tested by tests/unit/serving/test_scheduler.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from app.decoding.result import DecodingResult
from app.decoding.settings import DecodingSettings, Ends
from app.serving.shown_text import ShownText
from app.text.text_stream import TextStream

FinishReason = Literal["stop", "length"]


class Piece(NamedTuple):
    """Text that is settled."""

    text: str


class Finished(NamedTuple):
    """The end of a job: the rest of its text, why it ended, and its counts."""

    text: str
    reason: FinishReason
    result: DecodingResult


class Failed(NamedTuple):
    """The end of a job that could not be decoded."""

    error: Exception


Event = Piece | Finished | Failed
BatchKey = tuple[DecodingSettings, "Job | None"]


@dataclass(kw_only=True, eq=False)
class Job:
    """A prompt to continue; the scheduler's thread takes what rounds settle, and tells `listen` of it.

    Attributes:
        tokens: Token ids of the prompt, as many as the model's context takes and within its vocabulary.
        settings: Complete settings. Jobs whose settings differ in budget and stop condition alone can share a batch.
        stop: Texts, any of which ends the output and is left out of it.
        seed: Seed of the job's own random stream.
        listen: Called in the scheduler's thread with each piece and then once with the end; it must not block.
        alone: Whether the job shares no batch, since one that it was in could not be decoded.
        cancelled: Set by whoever no longer wants the job; the job ends without a further event.
    """

    tokens: Sequence[int]
    settings: DecodingSettings
    seed: int
    listen: Callable[[Event], None]
    tokenizer: PreTrainedTokenizerBase
    stop: tuple[str, ...] = ()
    alone: bool = False
    cancelled: bool = False
    ended: bool = False
    _told: bool = False
    _shown: ShownText = field(init=False)
    _text: TextStream = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    @property
    def batch_key(self) -> BatchKey:
        """What jobs of one batch have in common."""
        return replace(self.settings, max_new_tokens=0, stop=None), self if self.alone else None

    @property
    def ends(self) -> Ends:
        """Its own budget and stop condition, by which a job that nobody waits for any more leaves its batch."""
        return Ends(self.settings.max_new_tokens, self._stop)

    @property
    def can_begin_again(self) -> bool:
        """Whether the job is still wanted and nothing was told of it."""
        return not (self.ended or self.cancelled or self._told)

    def begin(self) -> None:
        """Forget all text, since the job is decoded from its beginning."""
        self._text, self._shown = TextStream(self.tokenizer, self.tokens), ShownText(self.stop)

    def take(self, tokens: Sequence[int]) -> None:
        """Take the tokens that a round settled."""
        if self.is_over:
            return
        if piece := self._shown.push("".join([self._text.push(token) for token in tokens])):
            self._tell(Piece(piece))

    @property
    def is_over(self) -> bool:
        return self.ended or self.cancelled

    def finish(self, result: DecodingResult) -> None:
        """Tell the end, unless it was told before or nobody waits for it."""
        if self.is_over:
            return
        rest = self._shown.push(self._text.rest()) + self._shown.rest()
        by_text = result.stop_reason in ("eos", "stop") or self._shown.stopped
        self._tell(Finished(rest, "stop" if by_text else "length", result))
        self.ended = True

    def fail(self, error: Exception) -> None:
        """Tell that the job could not be decoded, unless it has ended."""
        if not self.is_over:
            self.ended = True
            self.listen(Failed(error))

    def _tell(self, event: Event) -> None:
        self._told = True
        self.listen(event)

    def _stop(self, prompt: Sequence[int], tokens: Sequence[int], num_new: int) -> int | None:
        if self.cancelled or self._shown.stopped:
            return len(tokens)
        return None if self.settings.stop is None else self.settings.stop(prompt, tokens, num_new)
