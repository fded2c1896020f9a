"""How many generated semantic parses are right, overall and by group."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from app.errors import DataError
from app.topv2.semantic_parse import TARGET_FORMATS, Node, ParseError, TargetFormat, frame


class ParseScore(NamedTuple):
    """Shares of the answers of `num_examples`, each 0..1."""

    exact_match: float  # the whitespace-normalised text is the annotation's (the paper's metric)
    frame_match: float  # intents, slots and the words of leaf slots are the annotation's (see `frame`)
    well_formed: float  # the answer is a parse at all
    num_examples: int


class ParseScores(NamedTuple):
    """The score of all answers, and that of each group which has any."""

    overall: ParseScore
    by_group: dict[str, ParseScore]


class ParseHits(NamedTuple):
    """What is right of one answer, in the sense of `ParseScore`."""

    exact_match: bool
    frame_match: bool
    well_formed: bool


def judge(answer: str, right: Node, *, target_format: TargetFormat) -> ParseHits:
    """Compare an answer, which may be any text, with the right parse."""
    try:
        tree = TARGET_FORMATS[target_format].decode(answer)
    except ParseError:  # it counts as a wrong answer
        return ParseHits(exact_match=False, frame_match=False, well_formed=False)
    return ParseHits(exact_match=tree == right, frame_match=frame(tree) == frame(right), well_formed=True)


class ParseExactMatch(Metric):
    """Exact match of answers in `target_format` with their references, by group, summed over batches and ranks.

    Texts are compared as trees, which are equal exactly where the whitespace-normalised texts of parses are. `groups`
    are the same on every rank.
    """

    counts_G4: Tensor

    def __init__(self, groups: Sequence[str], *, target_format: TargetFormat) -> None:
        super().__init__()
        self.groups = tuple(sorted(set(groups)))
        self._target_format = target_format
        zeros = torch.zeros(len(self.groups), 4, dtype=torch.int64)  # exact, frame, well-formed, all
        self.add_state("counts_G4", zeros, dist_reduce_fx="sum")

    def update(self, answers: Sequence[str], references: Sequence[str], groups: Sequence[str]) -> None:
        """Add answers, which may be any text; DataError if a reference is no parse."""
        for answer, reference, group in zip(answers, references, groups, strict=True):
            try:
                right = TARGET_FORMATS[self._target_format].decode(reference)
            except ParseError as error:
                raise DataError(f"reference {reference!r} of {group}: {error}") from error
            hits = judge(answer, right, target_format=self._target_format)
            self.counts_G4[self.groups.index(group)] += torch.tensor((*hits, True), device=self.counts_G4.device)

    def compute(self) -> ParseScores | None:
        """Return the scores of everything that was added; None if nothing was."""
        counts_G4 = self.counts_G4.cpu()
        if not counts_G4.any():
            return None
        seen = ((group, counts_4) for group, counts_4 in zip(self.groups, counts_G4, strict=True) if counts_4.any())
        return ParseScores(_score(counts_G4.sum(0)), {group: _score(counts_4) for group, counts_4 in seen})


def _score(counts_4: Tensor) -> ParseScore:
    exact, in_frame, well_formed, total = counts_4.tolist()
    return ParseScore(exact / total, in_frame / total, well_formed / total, total)
