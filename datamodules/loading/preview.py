"""Batches of the training stream, counted by source and shown as text. Tested by tests/contract/test_data.py."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from app.errors import ConfigError
from app.layerskip.early_exit_loss import IGNORE_INDEX
from app.protocols import CorpusOwner, StreamOwner
from app.text.text_stream import text_of


@dataclass
class SourcePreview:
    """Counts of one source."""

    asked: float | None = None  # share of tokens that the config asks for; None where the mixture has no weights
    documents: int = 0  # that end in the rows
    tokens: int = 0  # without padding
    targets: int = 0  # tokens that bear loss
    bytes: int = 0  # of the tokens' text
    rows: int = 0
    seen: int | None = None  # records read, also those that wait in the shuffle buffer; None where nobody counts them
    skipped: int | None = None  # bad records among those


@dataclass
class Preview:
    """Counts of some batches."""

    sources: dict[str, SourcePreview]  # by name
    positions: int = 0  # of all rows, padding included
    seconds_to_first: float = 0.0  # until the first batch came
    tokens_per_second: float = 0.0  # padding included, until the last batch came
    # The documents of the first row: first token, last token, targets, text.
    sample: list[tuple[int, int, int, str]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources.values())

    @property
    def packing_efficiency(self) -> float:
        """Share of positions that are not padding."""
        return self.tokens / max(1, self.positions)


class ResumeCheck(NamedTuple):
    """Seconds from loading the position to the first batch, and whether the batches were the same."""

    seconds: float
    identical: bool


def preview(datamodule: LightningDataModule, *, num_batches: int) -> Preview:
    """Count `num_batches` training batches, at least 1; ConfigError if the datamodule does not say what it reads."""
    if not isinstance(datamodule, CorpusOwner):
        raise ConfigError("data", got=type(datamodule).__name__, allowed="a datamodule with tokenizer and source_names")
    weights = datamodule.source_weights if isinstance(datamodule, StreamOwner) else {}
    result = Preview({name: SourcePreview(weights.get(name)) for name in datamodule.source_names})
    started = time.perf_counter()
    for batch in islice(datamodule.train_dataloader(), num_batches):
        batch = datamodule.on_before_batch_transfer(batch, 0)
        if not result.positions:
            result.seconds_to_first = time.perf_counter() - started
        result.positions += batch["input_ids"].numel()
        for row in range(len(batch["input_ids"])):
            _count_row(result, {name: column[row] for name, column in batch.items()}, datamodule)
    result.tokens_per_second = result.positions / (time.perf_counter() - started)  # rows come in windows: no part of it
    if isinstance(datamodule, StreamOwner):
        for name, counts in datamodule.source_statistics().items():
            result.sources[name].seen, result.sources[name].skipped = counts.seen, counts.skipped
    return result


def check_resume(datamodule: LightningDataModule, fresh: LightningDataModule, *, num_batches: int = 4) -> ResumeCheck:
    """Save the position of `datamodule`, load it into its unused copy `fresh`, and compare the next batches of both."""
    state = json.loads(json.dumps(datamodule.state_dict()))
    expected = list(islice(_batches(datamodule), num_batches))
    started = time.perf_counter()
    fresh.load_state_dict(state)
    following = _batches(fresh)  # one iteration: where the trainer's step tells the position, a second begins anew
    found = [next(following)]
    seconds = time.perf_counter() - started
    found += islice(following, num_batches - 1)
    same = all(
        torch.equal(ours[name], theirs[name]) for ours, theirs in zip(expected, found, strict=True) for name in theirs
    )
    return ResumeCheck(seconds, same)


def _batches(datamodule: LightningDataModule) -> Iterator[dict[str, Tensor]]:
    for batch in datamodule.train_dataloader():
        yield datamodule.on_before_batch_transfer(batch, 0)


def _count_row(result: Preview, row: dict[str, Tensor], datamodule: Any) -> None:
    """Add one row: `input_ids`, `labels`, `position_ids` [S], `source` []."""
    source = result.sources[datamodule.source_names[int(row["source"])]]
    tokenizer = datamodule.tokenizer
    is_first = not any(other.rows for other in result.sources.values())
    for start, stop in _documents(row):
        ids, labels = row["input_ids"][start:stop], row["labels"][start:stop]
        text = text_of(tokenizer, ids.tolist(), special=True)
        targets = int((labels != IGNORE_INDEX).sum())
        source.tokens += stop - start
        source.targets += targets
        source.bytes += len(text.encode())
        source.documents += int((labels == tokenizer.eos_token_id).sum())
        if is_first:
            result.sample.append((start, stop - 1, targets, text))
    source.rows += 1


def _documents(row: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Return first and last + 1 position of each document; a document without a target is padding."""
    starts = [*torch.nonzero(row["position_ids"] == 0).flatten().tolist(), len(row["input_ids"])]
    found = []
    for start, stop in pairwise(starts):
        targets = torch.nonzero(row["labels"][start:stop] != IGNORE_INDEX).flatten()
        if len(targets):  # what the last target predicts ends the document, where the row holds it
            end = start + int(targets[-1]) + 1
            found.append((start, end + int(end < stop and row["input_ids"][end] == row["labels"][end - 1])))
    return found
