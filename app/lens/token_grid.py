"""What every layer predicts at each generated token, from one pass over the text.

The state that leaves each block is unembedded through the final norm and head, which all layers share. An exit that has
blocks or a norm of its own has a second row, in which its state goes through these, and which chooses among the ids of
the draft vocabulary alone, as its drafts do: it never learned anything about the others.

Shape legend: `T` tokens of prompt and output, `N` generated tokens, `C` of these in a chunk, `R` rows, `D` width,
`V` vocabulary, `K` most likely tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from app.decoding.sampling import over_vocabulary
from app.exits.layers_needed import LayersNeeded
from app.exits.states import positions_per_chunk, states_by_exit
from app.spans.decoder import SpanDecoder

TOP = 5


class GridRow(NamedTuple):
    """One prediction for each token.

    Attributes:
        exit_layer: Blocks of the model that were run, 1..L.
        num_own_blocks: Blocks of the exit's own that ran after them, before a norm of its own; None for a plain row.
    """

    exit_layer: int
    num_own_blocks: int | None = None

    @property
    def label(self) -> str:
        """`12`; for an exit's own row `12+1`, with the number of its blocks."""
        return f"{self.exit_layer}+{self.num_own_blocks}" if self.is_own else str(self.exit_layer)

    @property
    def is_own(self) -> bool:
        """Whether this is the row of an exit's own blocks and norm."""
        return self.num_own_blocks is not None


class Lines(NamedTuple):
    """The tokens that were on top of some row at one position, and how likely every row has each of them.

    Attributes:
        ids: Token ids, by descending highest probability in any row.
        probs: For each of them, its probability in every row.
    """

    ids: list[int]
    probs: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """Predictions of every row for each generated token of one text.

    Attributes:
        rows: The R rows by ascending exit, an exit's own row after its plain one. The plain row of L is the full model.
        tokens: The N generated tokens, at least one. Predictions for a token see all tokens before it.
        choices_RN: Token of highest logit.
        top_ids_RNK, top_probs_RNK: The K most likely tokens, the choice first, and their probabilities.
        entropy_RN: Entropy of the row's distribution, - sum q ln q, in nats.
        kl_RN: KL divergence of the full model's distribution p from the row's q, sum p ln (p / q), in nats. For an
            exit's own row, p is renormalised over the ids that the row may choose.
        lines: For each token, the tokens that were on top of some row.
    """

    rows: tuple[GridRow, ...]
    tokens: tuple[int, ...]
    choices_RN: Tensor
    top_ids_RNK: Tensor
    top_probs_RNK: Tensor
    entropy_RN: Tensor
    kl_RN: Tensor
    lines: tuple[Lines, ...]

    @property
    def num_layers(self) -> int:
        """L, the blocks of the model."""
        return self.rows[-1].exit_layer

    @property
    def matches(self) -> Tensor:
        """Whether each row chooses each token that was generated [R, N]."""
        return self.choices_RN == torch.tensor(self.tokens)

    @property
    def needed(self) -> LayersNeeded:
        """The layers that each token needed. An exit's own row has no part in this."""
        plain = [index for index, row in enumerate(self.rows) if not row.is_own]
        return LayersNeeded.of(self.matches[plain[:-1]].T.tolist(), num_layers=self.num_layers)

    @property
    def num_rounded(self) -> int:
        """Tokens that the full model chose otherwise when it looked at the whole text at once: none but by rounding."""
        return int((~self.matches[-1]).sum())


@torch.no_grad()
def read_token_grid(decoder: SpanDecoder, prompt: Sequence[int], tokens: Sequence[int]) -> TokenGrid:
    """Look at every layer in one pass over a prompt and what the model generated after it.

    The logits of all rows exist for one chunk of positions at a time.

    Args:
        decoder: In eval mode.
        prompt: Token ids, at least one.
        tokens: The generated token ids, at least one.
    """
    rows, states = [], []
    for state in states_by_exit(decoder, [*prompt, *tokens[:-1]]):
        rows.append(GridRow(state.exit_layer))
        states.append(state.hidden_1TD[0, len(prompt) - 1 :])
        if state.exit_layer in decoder.own_exits:
            rows.append(GridRow(state.exit_layer, len(decoder.exit_span(state.exit_layer))))
            states.append(state.exit_1TD[0, len(prompt) - 1 :])
    size = positions_per_chunk(decoder.vocab_size, num_exits=len(rows))
    chunks = [_read(decoder, rows, part) for part in torch.split(torch.stack(states), size, dim=1)]
    choices_RN, top_ids_RNK, top_probs_RNK, entropy_RN, kl_RN = (
        torch.cat(parts, dim=1).cpu() for parts in zip(*(tensors for tensors, _ in chunks), strict=True)
    )
    return TokenGrid(
        rows=tuple(rows),
        tokens=tuple(tokens),
        choices_RN=choices_RN,
        top_ids_RNK=top_ids_RNK,
        top_probs_RNK=top_probs_RNK,
        entropy_RN=entropy_RN,
        kl_RN=kl_RN,
        lines=tuple(line for _, lines in chunks for line in lines),
    )


def _read(decoder: SpanDecoder, rows: Sequence[GridRow], states_RCD: Tensor) -> tuple[tuple[Tensor, ...], list[Lines]]:
    """Return choices, top ids, top probabilities, entropy and divergence, in this order, and the lines."""
    logits_RCV = decoder.unembed(states_RCD).float()
    for index, row in enumerate(rows):
        if row.is_own:
            logits_CV = decoder.draft_logits(states_RCD[index : index + 1], exit_layer=row.exit_layer)[0]
            logits_RCV[index] = over_vocabulary(logits_CV, decoder.draft_ids, decoder.vocab_size)
    choices_RC = logits_RCV.argmax(-1)
    log_probs_RCV = logits_RCV.log_softmax(-1)
    probs_RCV = log_probs_RCV.exp()
    entropy_RC = torch.special.entr(probs_RCV).sum(-1)
    kl_RC = torch.stack([_divergence(log_probs_RCV[-1], row_CV) for row_CV in log_probs_RCV])
    lines = [_lines(choices_RC[:, column], probs_RCV[:, column]) for column in range(states_RCD.shape[1])]
    # Of equal logits, which are common in bfloat16, topk may put any first; the choice is the one of the lowest id.
    chosen_RC1 = choices_RC[..., None]
    ranked_RCV = logits_RCV.scatter_(-1, chosen_RC1, float("inf"))
    top_ids_RCK = ranked_RCV.topk(min(TOP, logits_RCV.shape[-1])).indices
    return (choices_RC, top_ids_RCK, probs_RCV.gather(-1, top_ids_RCK), entropy_RC, kl_RC), lines


def _divergence(log_full_CV: Tensor, log_row_CV: Tensor) -> Tensor:
    """Return KL(full || row) [C] over the ids that the row may choose, which have a finite log probability."""
    may_choose_CV = log_row_CV.isfinite()
    if not may_choose_CV.all():
        log_full_CV = log_full_CV.where(may_choose_CV, float("-inf")).log_softmax(-1)
    terms_CV = log_full_CV.exp() * (log_full_CV - log_row_CV)
    return terms_CV.where(may_choose_CV, 0).sum(-1).clamp(min=0)


def _lines(choices_R: Tensor, probs_RV: Tensor) -> Lines:
    ids = sorted({*choices_R.tolist()})
    lines = zip(ids, probs_RV[:, ids].T.tolist(), strict=True)
    ids_and_probs = sorted(lines, key=lambda line: -max(line[1]))
    return Lines([token for token, _ in ids_and_probs], [probs for _, probs in ids_and_probs])
