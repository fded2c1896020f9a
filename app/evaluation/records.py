"""What an evaluation is of, what it is asked to do, and what it finds out about each example.

Tested by tests/contract/test_evaluate.py and tests/unit/evaluation/test_likelihood_tasks.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from app.errors import check_choice, check_range
from app.evaluation.rows import Item
from app.evaluation.task import Task
from app.protocols import ExitableDecoder

# likelihood: the exit's own probabilities. early_exit: what is decoded from it, lossy. self_speculative: drafts from it
# which the full model verifies, lossless. autoregressive: the full model alone.
Strategy = Literal["likelihood", "autoregressive", "early_exit", "self_speculative"]
OnLong = Literal["truncate_left", "skip", "error"]
ON_LONG: tuple[OnLong, ...] = ("truncate_left", "skip", "error")


class EvaluatedModel(NamedTuple):
    """The model that is measured, in eval mode.

    Attributes:
        decoder: The view on its weights; exits with blocks of their own are exits like others.
        tokenizer: Of transformers.
        eos_token_ids: Every token id that ends a text.
    """

    decoder: ExitableDecoder
    tokenizer: Any
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is done with each task.

    Args:
        exit_layers: Exits to measure, each from 1 to the model's number of layers, which is the full model; all by
            default.
        limit: Take so many rows of each task, at least 1, as many of each group (such as a subject) as of any other.
            Of texts it counts windows.
        num_shots: Worked examples before each question instead of each task's own number.
        batch_size: Examples that are run together, at least 1; it does not change the results.
        on_long: What to do with a prompt that is longer than the model's context: leave out its beginning, skip the
            row, or stop with an error. How many there were is told.
        max_new_tokens: Most tokens of a generated answer instead of each task's own number, at least 2.
        window: Tokens of a window of text in which perplexity is measured, at least 2; by default 1024, or the context
            if that is shorter.
        num_draft_tokens: Draft length of self-speculative decoding in generation tasks, which is measured beside each
            early exit; 0 leaves it out.
        allow_running_programs: Run the programs that the model writes, which the tasks that are scored by tests need.
    """

    exit_layers: list[int] | None = None
    limit: int | None = None
    num_shots: int | None = None
    batch_size: int = 8
    on_long: OnLong = "truncate_left"
    max_new_tokens: int | None = None
    window: int | None = None
    num_draft_tokens: int = 4
    allow_running_programs: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("limit", 1),
            ("num_shots", 0),
            ("batch_size", 1),
            ("max_new_tokens", 2),
            ("window", 2),
            ("num_draft_tokens", 0),
        ):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low=least)
        check_choice("on_long", self.on_long, ON_LONG)


class Decoded(NamedTuple):
    """How the answer to one example was decoded; the pass over the prompt and its token are left out.

    Attributes:
        tokens: New tokens after the first.
        seconds: The time for them; examples that were decoded together share it equally.
        drafted, accepted: Tokens that were drafted, and those of them that the full model kept.
        identical: Whether the tokens are those of autoregressive decoding; None where they need not be.
    """

    tokens: int
    seconds: float
    drafted: int = 0
    accepted: int = 0
    identical: bool | None = None


class Score(NamedTuple):
    """The figures of one example at one exit, by metric, and how it was decoded if something was generated."""

    exit_layer: int
    strategy: Strategy
    values: Mapping[str, float]
    decoded: Decoded | None = None


class Record(NamedTuple):
    """What was found out about one example.

    Attributes:
        task: Name of the task.
        row: Index of the example in its task; with `task` it tells records apart.
        group: What the results are told by beside the whole.
        scores: One of each exit and strategy; none for a row that was skipped.
        weight: What the figures count in means, such as a window's number of tokens.
        truncated: Whether the beginning of the prompt was left out.
        chance: The score of a guess, None where there is no such thing.
        detail: Whatever helps a reader to look into it, as JSON.
    """

    task: str
    row: int
    group: str
    scores: tuple[Score, ...]
    weight: float = 1.0
    truncated: bool = False
    chance: float | None = None
    detail: Mapping[str, Any] = {}


# Scores the items of one task at all exits, and yields records as they are done, in any order.
Runner = Callable[[EvaluatedModel, Task, Sequence[Item], Sequence[int], EvaluationSettings], Iterator[Record]]
