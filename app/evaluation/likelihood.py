"""Log-probabilities of given tokens at every exit, in one pass of the model over each batch.

What examples of a batch have in common is run once, and so is what the continuations of one example have in common.
Only the positions that predict a scored token go through the head, which on a small model costs as much as several
blocks. Tested by tests/unit/evaluation/test_likelihood.py.

Shape legend: `B` rows of a batch, `T` their positions, `N` positions that predict, `M` tokens that are scored, `D`
width, `V` vocabulary, `E` exits.
"""

from collections.abc import Sequence
from itertools import count, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from app.decoding.drafters import run_exit_blocks
from app.exits.states import positions_per_chunk
from app.protocols import DecoderCache, ExitableDecoder

_LOGITS_IN_CACHE = 2**20  # that are normalised at a time; more of them would leave a CPU's cache meanwhile
_SHARED_FROM = 16  # tokens; running fewer once for a whole batch would not pay for a further pass


class Scored(NamedTuple):
    """A text as token ids, of which those from `start` on are scored, given all before them; `start` is at least 1."""

    tokens: Sequence[int]
    start: int


class _Target(NamedTuple):
    """A token that is scored, the position in its row of new tokens that predicts it, and its slot in the results."""

    position: int
    token: int
    slot: int


class _Piece(NamedTuple):
    """New tokens of a row, and which tokens they predict."""

    tokens: Sequence[int]
    targets: Sequence[_Target] = ()


def log_probabilities(
    decoder: ExitableDecoder, examples: Sequence[Sequence[Scored]], exit_layers: Sequence[int]
) -> list[list[Tensor]]:
    """Score the continuations of each example at each exit.

    Args:
        decoder: The model in eval mode.
        examples: The continuations of each example; no one is longer than the context, its last token not counted.
        exit_layers: Exits, ascending.

    Returns:
        For each example and continuation the natural logarithms [E, M] of its scored tokens' probabilities, float32.
    """
    targets, sizes = _targets(examples), [len(scored.tokens) - scored.start for each in examples for scored in each]
    run = [[list(scored.tokens[:-1]) for scored in example] for example in examples]
    trunks = [_common(continuations) for continuations in run]
    first_scored = min(scored.start for example in examples for scored in example) - 1
    root = min(_common([tokens[:trunk] for (tokens, *_), trunk in zip(run, trunks, strict=True)]), first_scored)
    if root < _SHARED_FROM or len(examples) == 1:
        root = 0
    cache = decoder.new_cache(
        batch_size=1 if root else len(examples), capacity=max(len(tokens) for each in run for tokens in each)
    )
    found_EM = torch.empty(len(exit_layers), sum(sizes), device=decoder.device)
    passes = _Passes(decoder, cache, tuple(exit_layers), found_EM)
    if root:
        passes.run([_Piece(run[0][0][:root])])
        cache.keep_rows([0] * len(examples))
    passes.run(
        [
            _piece(continuations[0], [each for per in wanted for each in per], root, trunk)
            for continuations, wanted, trunk in zip(run, targets, trunks, strict=True)
        ]
    )
    tails = [
        (number, _piece(tokens, wanted, trunks[number], len(tokens)))
        for number in range(len(examples))
        for tokens, wanted in zip(run[number], targets[number], strict=True)
        if len(tokens) > trunks[number]
    ]
    if tails:
        cache.keep_rows([number for number, _ in tails])
        passes.run([piece for _, piece in tails])
    scores = iter(torch.split(found_EM.cpu(), sizes, dim=1))
    return [[next(scores) for _ in example] for example in examples]


def _targets(examples: Sequence[Sequence[Scored]]) -> list[list[list[_Target]]]:
    """The scored tokens of each continuation, and the position in it that predicts each."""
    slots = count()
    return [
        [
            [_Target(index - 1, scored.tokens[index], next(slots)) for index in range(scored.start, len(scored.tokens))]
            for scored in example
        ]
        for example in examples
    ]


def _piece(tokens: Sequence[int], targets: Sequence[_Target], start: int, stop: int) -> _Piece:
    """The tokens start..stop-1 of a row, and what they predict."""
    here = [each._replace(position=each.position - start) for each in targets if start <= each.position < stop]
    return _Piece(tokens[start:stop], here)


def _common(rows: Sequence[Sequence[int]]) -> int:
    """The number of tokens in which all rows begin alike."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


class _Passes(NamedTuple):
    """Runs new tokens of every row through the model, and writes the log-probabilities of the targets [E, M]."""

    decoder: ExitableDecoder
    cache: DecoderCache
    exit_layers: tuple[int, ...]
    found_EM: Tensor

    def run(self, pieces: Sequence[_Piece]) -> None:
        """Append the tokens to the cache; shorter rows are filled up, and what was filled up is forgotten again."""
        longest = max(len(piece.tokens) for piece in pieces)
        if not longest:
            return
        device = self.decoder.device
        lengths = [old + len(piece.tokens) for old, piece in zip(self.cache.lengths(0), pieces, strict=True)]
        padded = [[*piece.tokens, *[0] * (longest - len(piece.tokens))] for piece in pieces]
        targets = [(row * longest + each.position, each) for row, piece in enumerate(pieces) for each in piece.targets]
        positions = torch.tensor([position for position, _ in targets], dtype=torch.long, device=device)
        positions_N, predicts_M = torch.unique(positions, return_inverse=True)  # choices of one token share a position
        tokens_M = torch.tensor([each.token for _, each in targets], dtype=torch.long, device=device)
        slots_M = torch.tensor([each.slot for _, each in targets], dtype=torch.long, device=device)
        hidden_BTD, start = self.decoder.embed(torch.tensor(padded, device=device)), 0
        for exit_idx, exit_layer in enumerate(self.exit_layers):
            hidden_BTD = self.decoder.run_blocks(hidden_BTD, start=start, stop=exit_layer, cache=self.cache)
            start = exit_layer
            leaving_BTD = run_exit_blocks(self.decoder, hidden_BTD, exit_layer=exit_layer, cache=self.cache)
            if targets:
                states_ND = leaving_BTD.flatten(0, 1).index_select(0, positions_N)
                self.found_EM[exit_idx, slots_M] = self._score(states_ND, predicts_M, tokens_M, exit_layer=exit_layer)
        self.cache.truncate(lengths)

    def _score(self, states_ND: Tensor, predicts_M: Tensor, tokens_M: Tensor, *, exit_layer: int) -> Tensor:
        """Log-probabilities [M] of tokens, each predicted by one of the positions; logits exist for some at a time."""
        few = max(1, _LOGITS_IN_CACHE // self.decoder.vocab_size)
        found_M, first = torch.empty(len(tokens_M), device=states_ND.device), 0
        for some_ND in torch.split(states_ND, positions_per_chunk(self.decoder.vocab_size)):
            for logits_NV in torch.split(self.decoder.unembed(some_ND[None], exit_layer=exit_layer)[0], few):
                here = ((predicts_M >= first) & (predicts_M < first + len(logits_NV))).nonzero()[:, 0]
                log_probs_NV = logits_NV.log_softmax(-1, dtype=torch.float32)
                found_M[here] = log_probs_NV[predicts_M[here] - first, tokens_M[here]]
                first += len(logits_NV)
        return found_M
