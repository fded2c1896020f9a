"""The same results by the most obvious code: everything recomputed, nothing cached."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def greedy_by_recomputation(
    model: PreTrainedModel,
    prompt: list[int],
    *,
    max_new_tokens: int,
    exit_layer: int | None = None,
    eos_token_ids: tuple[int, ...] = (),
) -> list[int]:
    """Greedy tokens from one forward of the plain model over everything so far, for each token."""
    tokens: list[int] = []
    for _ in range(max_new_tokens):
        out = model(torch.tensor([prompt + tokens]), output_hidden_states=True, use_cache=False)
        logits = out.logits
        if exit_layer is not None and exit_layer < model.config.num_hidden_layers:
            logits = model.lm_head(model.model.norm(out.hidden_states[exit_layer]))  # not normed before the last
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in eos_token_ids:
            break
    return tokens


def law_by_sorting(logits: list[float], *, temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """Temperature, top-k and top-p in plain Python, token by token."""
    weights = [math.exp((score - max(logits)) / temperature) for score in logits]
    ranked = sorted(range(len(logits)), key=lambda token: -weights[token])[: top_k or len(logits)]
    total = sum(weights[token] for token in ranked)
    kept: list[int] = []
    while sum(weights[token] for token in kept) / total < top_p and len(kept) < len(ranked):
        kept.append(ranked[len(kept)])
    mass = sum(weights[token] for token in kept)
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(logits))]
