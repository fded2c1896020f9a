"""One token a step; with an `exit_layer` below num_layers this is lossy early-exit decoding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from app.decoding.rounds import Job, Round


def autoregressive_rounds(job: Job) -> Iterator[Round]:
    """Yield `budget` rounds of one token; the first is the prefill."""
    decoder = job.decoder
    cache = decoder.new_cache(len(job.prompt_tokens) + job.budget)
    tokens = list(job.prompt_tokens)
    for _ in range(job.budget):
        tokens_1T = torch.tensor([tokens], device=decoder.device)
        hidden_1TD = decoder.run_blocks(decoder.embed(tokens_1T), start=0, stop=job.exit_layer, cache=cache)
        _, token = job.rule.verify((), decoder.unembed(hidden_1TD[:, -1:])[0])  # logits of the last position only
        tokens = [token]
        yield Round(tokens)
