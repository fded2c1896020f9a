"""Runs tasks that are scored on what the model writes: from the full model, lossy from each exit, lossless with drafts.

Three ways to decode, all greedy, and told apart in every result:

- `autoregressive`: the full model;
- `early_exit`: the exit's own choice at every token, which is lossy;
- `self_speculative`: the exit drafts and the full model verifies, which is lossless, so that its figures are the full
  model's and only its speed is its own.

The ways take turns at every batch, so that the machine's noise falls on all alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from app.decoding.engine import decode_batch
from app.decoding.result import DecodingResult
from app.decoding.settings import DecodingSettings
from app.decoding.stopping import StopStrings
from app.errors import ConfigError, DataError
from app.evaluation.programs import ProgramRunner
from app.evaluation.records import Decoded, EvaluatedModel, EvaluationSettings, Record, Score, Strategy
from app.evaluation.rows import Item
from app.evaluation.task import AnswerExample, GenerationTask, Task
from app.text.text_stream import continuation
from app.text.text_tokens import around, prompt_tokens

_PASSED = "pass@1"


class Way(NamedTuple):
    """A way to decode; `exit_layer` counts the blocks run, by drafts where there are any."""

    strategy: Strategy
    exit_layer: int


class _Prompt(NamedTuple):
    item: Item
    example: AnswerExample
    tokens: list[int]
    truncated: bool

    @property
    def limits(self) -> tuple[tuple[str, ...], int]:
        return self.example.stop, self.example.max_new_tokens


def check_program_tasks(tasks: Sequence[Task], settings: EvaluationSettings) -> None:
    """Raise ConfigError if a task runs programs that the model writes and the user has not allowed it."""
    running = [task.name for task in tasks if isinstance(task, GenerationTask) and task.program is not None]
    if running and not settings.allow_running_programs:
        allowed = f"true for {', '.join(running)}, scored by running the programs that the model writes"
        fix = "set it if you accept what app/evaluation/programs.py says of the risk"
        raise ConfigError("allow_running_programs", got=False, allowed=allowed, fix=fix)


def ways_of(exit_layers: Sequence[int], *, num_layers: int, num_draft_tokens: int) -> list[Way]:
    """The ways to decode at these exits; what drafts is measured beside the full model, whatever the exits."""
    early = [exit_layer for exit_layer in exit_layers if exit_layer < num_layers]
    drafting = early if num_draft_tokens else []
    full = [num_layers] if drafting or num_layers in exit_layers else []
    return [
        *(Way("autoregressive", exit_layer) for exit_layer in full),
        *(Way("early_exit", exit_layer) for exit_layer in early),
        *(Way("self_speculative", exit_layer) for exit_layer in drafting),
    ]


def run_generation(
    subject: EvaluatedModel, task: Task, items: Sequence[Item], exit_layers: Sequence[int], settings: EvaluationSettings
) -> Iterator[Record]:
    """Continue each prompt in every way and score what comes of it. Implements `records.Runner`.

    Long prompts come first, so that the remaining time is not underestimated and memory suffices to the end.

    Raises:
        ConfigError: The task runs programs, which the user has not allowed or this machine cannot.
        DataError: A prompt is longer than the context, and is not to be cut or skipped; or it is empty.
    """
    assert isinstance(task, GenerationTask)
    check_program_tasks([task], settings)
    runner = ProgramRunner() if task.program is not None else None
    decoder = subject.decoder
    ways = ways_of(exit_layers, num_layers=decoder.num_layers, num_draft_tokens=settings.num_draft_tokens)
    prompts: list[_Prompt] = []
    for item in items:
        prompt = _encode(item, subject, settings)
        if prompt is None:
            yield Record(task.name, item.row, item.group, ())
        else:
            prompts.append(prompt)
    prompts.sort(key=lambda prompt: (*prompt.limits, len(prompt.tokens)), reverse=True)
    turn = 0
    for _, alike in groupby(prompts, key=lambda prompt: prompt.limits):
        waiting = list(alike)
        for first in range(0, len(waiting), settings.batch_size):
            batch = waiting[first : first + settings.batch_size]
            in_turn = [*ways[turn % len(ways) :], *ways[: turn % len(ways)]]
            results = {way: _decode(subject, way, batch, settings) for way in in_turn}
            turn += 1
            for row, prompt in enumerate(batch):
                yield _record(task, prompt, {way: _Answer.of(results[way], row) for way in ways}, subject, runner)


def _encode(item: Item, subject: EvaluatedModel, settings: EvaluationSettings) -> _Prompt | None:
    """The tokens of a prompt, cut at its beginning if the context has no room for the answer; None to skip the row."""
    example = item.example
    assert isinstance(example, AnswerExample)
    if settings.max_new_tokens is not None:
        example = example._replace(max_new_tokens=settings.max_new_tokens)
    tokens = prompt_tokens(subject.tokenizer, example.prompt)
    if not tokens:
        raise DataError(f"{item.location}: got an empty prompt, allowed one of at least one token")
    max_length = subject.decoder.max_length
    room = max_length - min(example.max_new_tokens, max_length // 2)  # a long answer does not push the prompt out
    if len(tokens) <= room:
        return _Prompt(item, example, tokens, truncated=False)
    if settings.on_long == "skip":
        return None
    if settings.on_long == "error":
        allowed = f"{room}, the model's context of {max_length} without the answer's part"
        fix = "on_long=truncate_left leaves out its beginning, and on_long=skip the row"
        raise DataError(f"{item.location}: got a prompt of {len(tokens)} tokens, allowed up to {allowed}; {fix}")
    before = around(subject.tokenizer).before[: room - 1]
    return _Prompt(item, example, [*before, *tokens[len(tokens) - room + len(before) :]], truncated=True)


def _decode(
    subject: EvaluatedModel, way: Way, batch: Sequence[_Prompt], settings: EvaluationSettings
) -> list[DecodingResult]:
    stop, max_new_tokens = batch[0].limits
    own = DecodingSettings(
        max_new_tokens=max_new_tokens,
        eos_token_ids=subject.eos_token_ids,
        stop=StopStrings(subject.tokenizer, stop) if stop else None,
        exit_layer=None if way.strategy == "autoregressive" else way.exit_layer,
        num_draft_tokens=settings.num_draft_tokens if way.strategy == "self_speculative" else None,
    )
    assert way.strategy != "likelihood"
    prompts = [prompt.tokens for prompt in batch]
    return decode_batch(subject.decoder, prompts, strategy=way.strategy, settings=own)


class _Answer(NamedTuple):
    """The result of one prompt, and its equal share of the time that its batch took."""

    result: DecodingResult
    seconds: float

    @classmethod
    def of(cls, batch: Sequence[DecodingResult], row: int) -> "_Answer":
        return cls(batch[row], max(result.seconds_decode for result in batch) / len(batch))

    def decoded(self, full: "_Answer | None") -> Decoded:
        result = self.result
        identical = None if full is None else result.tokens == full.result.tokens
        return Decoded(result.num_decoded, self.seconds, result.drafted, result.accepted, identical)


def _record(
    task: GenerationTask,
    prompt: _Prompt,
    answers: Mapping[Way, _Answer],
    subject: EvaluatedModel,
    runner: ProgramRunner | None,
) -> Record:
    full = next((answer for way, answer in answers.items() if way.strategy == "autoregressive"), None)
    texts: dict[str, str] = {}
    judged: dict[str, dict[str, float]] = {}  # so that lossless ways do not run the same program again
    scores = []
    for way, answer in answers.items():
        text = answer_text(subject.tokenizer, prompt.tokens, answer.result.tokens, stop=prompt.example.stop)
        if text not in judged:
            judged[text] = _judge(task, text, prompt.example, runner)
        texts[f"{way.strategy} {way.exit_layer}"] = text
        decoded = answer.decoded(full if way.strategy == "self_speculative" else None)
        scores.append(Score(way.exit_layer, way.strategy, judged[text], decoded))
    item = prompt.item
    return Record(task.name, item.row, item.group, tuple(scores), truncated=prompt.truncated, detail={"answers": texts})


def answer_text(tokenizer: object, prompt: Sequence[int], tokens: Sequence[int], *, stop: Sequence[str]) -> str:
    """The text of an answer, without special tokens and from the first stop text on."""
    text = continuation(tokenizer, prompt, tokens)
    ends = [start for string in stop if (start := text.find(string)) >= 0]
    return text[: min(ends, default=len(text))]


def _judge(task: GenerationTask, text: str, example: AnswerExample, runner: ProgramRunner | None) -> dict[str, float]:
    if task.program is None or runner is None:
        assert task.score is not None
        return task.score(text, example)
    return {_PASSED: float(runner.run(task.program(text, example)).outcome == "passed")}
