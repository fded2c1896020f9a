"""Runs tasks that are scored by log-likelihood: multiple choice, and the perplexity of texts.

Tested by tests/unit/evaluation/test_likelihood_tasks.py.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from app.errors import NotFiniteError
from app.evaluation.encoding import EncodedChoices, ExampleEncoder
from app.evaluation.likelihood import Scored, log_probabilities
from app.evaluation.records import EvaluatedModel, EvaluationSettings, Record, Score
from app.evaluation.rows import Item
from app.evaluation.task import ChoiceExample, Task, Window


def run_choices(
    subject: EvaluatedModel, task: Task, items: Sequence[Item], exit_layers: Sequence[int], settings: EvaluationSettings
) -> Iterator[Record]:
    """Answer each item with the choice that is most likely as a whole (acc), and that is most likely a byte (acc_norm).

    Items of a group come together, since they begin alike, and long ones first. Implements `records.Runner`.
    """
    encoder = ExampleEncoder(subject.tokenizer)
    ordered = sorted(items, key=lambda item: (item.group, -_length(item)))
    for first in range(0, len(ordered), settings.batch_size):
        encoded: list[tuple[Item, EncodedChoices]] = []
        for item in ordered[first : first + settings.batch_size]:
            choices = encoder.choices(item, max_length=subject.decoder.max_length, on_long=settings.on_long)
            if choices is None:
                yield Record(task.name, item.row, item.group, ())
            else:
                encoded.append((item, choices))
        if encoded:
            scores = log_probabilities(subject.decoder, [each.choices for _, each in encoded], exit_layers)
            for (item, each), found in zip(encoded, scores, strict=True):
                yield _answered(task, item, found, exit_layers, truncated=each.truncated)


def run_windows(
    subject: EvaluatedModel, task: Task, items: Sequence[Item], exit_layers: Sequence[int], settings: EvaluationSettings
) -> Iterator[Record]:
    """Measure the mean cross entropy of each window's tokens in nats (loss). Implements `records.Runner`."""
    for first in range(0, len(items), settings.batch_size):
        batch = items[first : first + settings.batch_size]
        windows = [item.example for item in batch if isinstance(item.example, Window)]
        scores = log_probabilities(subject.decoder, [[Scored(each.tokens, 1)] for each in windows], exit_layers)
        for item, (found_EM,) in zip(batch, scores, strict=True):
            _check_finite(found_EM, item, exit_layers)
            losses = (-found_EM.double().mean(dim=1)).tolist()
            figures = [
                Score(layer, "likelihood", {"loss": loss}) for layer, loss in zip(exit_layers, losses, strict=True)
            ]
            yield Record(task.name, item.row, item.group, tuple(figures), weight=found_EM.shape[1])


def _length(item: Item) -> int:
    return len(item.example.context) if isinstance(item.example, ChoiceExample) else 0


def _answered(
    task: Task, item: Item, found: Sequence[Tensor], exit_layers: Sequence[int], *, truncated: bool
) -> Record:
    example = item.example
    assert isinstance(example, ChoiceExample)
    for found_EM in found:
        _check_finite(found_EM, item, exit_layers)
    sums = [found_EM.double().sum(dim=1).tolist() for found_EM in found]
    by_exit = {layer: [each[idx] for each in sums] for idx, layer in enumerate(exit_layers)}
    scores = [Score(layer, "likelihood", accuracies(example, logs)) for layer, logs in by_exit.items()]
    return Record(
        task.name,
        item.row,
        item.group,
        tuple(scores),
        truncated=truncated,
        chance=1 / len(example.choices),
        detail={"answer": example.answer, "log_likelihoods": {str(layer): logs for layer, logs in by_exit.items()}},
    )


def accuracies(example: ChoiceExample, log_likelihoods: Sequence[float]) -> dict[str, float]:
    """Whether the right choice is the likeliest, and whether it is so by bytes; among equals the first one counts."""
    ranked = rankings(example, log_likelihoods)
    return {name: float(likeliest(values) == example.answer) for name, values in ranked.items()}


def rankings(example: ChoiceExample, log_likelihoods: Sequence[float]) -> dict[str, list[float]]:
    """What each metric ranks the choices by: their log-likelihood in nats as a whole (acc), or by byte (acc_norm).

    A choice's bytes are those of its UTF-8 text without the space that parts it from the context. (This is acc and
    acc_bytes of lm-evaluation-harness, whose acc_norm divides by characters instead.)
    """
    sizes = [len(choice.removeprefix(" ").encode()) for choice in example.choices]
    by_byte = [value / size for value, size in zip(log_likelihoods, sizes, strict=True)]
    return {"acc": list(log_likelihoods), "acc_norm": by_byte}


def likeliest(values: Sequence[float]) -> int:
    """The index of the highest value; among equals the first one counts."""
    return max(range(len(values)), key=values.__getitem__)


def _check_finite(found_EM: Tensor, item: Item, exit_layers: Sequence[int]) -> None:
    finite_E = found_EM.isfinite().all(dim=1)
    if not finite_E.all():
        exit_layer = exit_layers[int(finite_E.int().argmin())]
        raise NotFiniteError(f"{item.location}: log-likelihoods of exit {exit_layer} are not finite; try dtype float32")
