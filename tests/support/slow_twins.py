"""The same results by the most obvious code: everything recomputed, nothing cached."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def greedy_by_recomputation(
    model: PreTrainedModel,
    prompt: list[int],
    *,
    max_new_tokens: int,
    exit_layer: int | None = None,
    eos_token_ids: tuple[int, ...] = (),
    processor: Callable[[Tensor, Tensor], Tensor] | None = None,
    least_gap: float = 0.0,
) -> list[int]:
    """Greedy tokens from one forward of the plain model over everything so far, for each token.

    Ends early where the best two scores are less than `least_gap` apart: rounding may decide there.
    """
    tokens: list[int] = []
    for _ in range(max_new_tokens):
        ids = torch.tensor([prompt + tokens])
        out = model(ids, output_hidden_states=True, use_cache=False)
        scores = out.logits[:, -1]
        if exit_layer is not None and exit_layer < model.config.num_hidden_layers:
            scores = model.lm_head(model.model.norm(out.hidden_states[exit_layer][:, -1]))  # not normed before the last
        if processor is not None:
            scores = processor(ids, scores.float())
        best, second = scores[0].topk(2).values.tolist()
        if best - second < least_gap:
            break
        tokens.append(int(scores[0].argmax()))
        if tokens[-1] in eos_token_ids:
            break
    return tokens


def cut_at_end(
    tokens: list[int], *, budget: int, eos_token_ids: Sequence[int] = (), pattern: Sequence[int] = ()
) -> tuple[list[int], str]:
    """What of an endless continuation is to come, looking at one token after the other, and why it ends."""
    for end in range(1, budget + 1):
        if pattern and tuple(tokens[:end][-len(pattern) :]) == tuple(pattern):
            return tokens[:end], "stop"
        if tokens[end - 1] in eos_token_ids:
            return tokens[:end], "eos"
    return tokens[:budget], "budget"


def probs_by_sorting(
    logits: list[float], *, temperature: float, top_k: int | None, top_p: float, min_p: float = 0.0
) -> list[float]:
    """Temperature, top-k, top-p and min-p in plain Python, token by token."""
    weights = [math.exp((score - max(logits)) / temperature) for score in logits]
    ranked = sorted(range(len(logits)), key=lambda token: -weights[token])[: top_k or len(logits)]
    total = sum(weights[token] for token in ranked)
    kept: list[int] = []
    while sum(weights[token] for token in kept) / total < top_p and len(kept) < len(ranked):
        kept.append(ranked[len(kept)])
    kept = [token for token in kept if weights[token] >= min_p * weights[kept[0]]]
    mass = sum(weights[token] for token in kept)
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(logits))]


def probs_of_sequences(
    distribution: Callable[[tuple[int, ...]], Sequence[float]], *, length: int, start: tuple[int, ...]
) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of `start` by `length` tokens, each drawn given everything before it."""
    out: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        out = {(*seq, t): p * q for seq, p in out.items() if p > 0 for t, q in enumerate(distribution((*start, *seq)))}
    return out
