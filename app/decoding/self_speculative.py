"""Draft with the first blocks, verify with the rest, on one cache (LayerSkip, arXiv 2404.16710, section 4.3).

Shape legend: `T` new tokens, `S` verified positions (drafts + 1), `D` width. E is `job.exit_layer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from app.decoding.rounds import Job, Round
from app.protocols import DecoderCache


def self_speculative_rounds(job: Job) -> Iterator[Round]:
    """Yield the prefill's token, then rounds of 1 to drafts + 1 tokens, `budget` tokens in all.

    A round may settle one token more than it drafts, so it drafts at most remaining - 1. No position past the
    budget, and so none past the context, is ever run; a round that may not draft is a plain step.
    """
    cache = job.decoder.new_cache(len(job.prompt_tokens) + job.budget)
    hidden_1TD = _run_from_exit(job, _run_to_exit(job, job.prompt_tokens, cache), cache)
    _, token = job.rule.verify((), job.decoder.unembed(hidden_1TD[:, -1:])[0])
    yield Round([token])
    remaining = job.budget - 1
    while remaining:
        length = cache.length(0)  # everything settled except `token`, which no block has seen
        drafts, exit_states_1SD = _draft(job, token, min(job.num_draft_tokens, remaining - 1), cache)
        hidden_1SD = _run_from_exit(job, exit_states_1SD, cache)
        accepted, next_token = job.rule.verify(drafts, job.decoder.unembed(hidden_1SD)[0])
        cache.truncate(length + 1 + accepted)
        yield Round([*drafts[:accepted], next_token], drafted=len(drafts), accepted=accepted)
        remaining -= accepted + 1
        token = next_token


def _draft(job: Job, token: int, limit: int, cache: DecoderCache) -> tuple[list[int], Tensor]:
    """Up to `limit` tokens after `token`, and the exit states [1, S, D] of `token` and of each of them.

    The last draft runs through blocks 0..E-1 for verification alone; all others had to, to draft the next.
    """
    drafts: list[int] = []
    exit_states = [_run_to_exit(job, [token], cache)]
    while len(drafts) < limit and not job.eos_token_ids.intersection(drafts[-1:]):
        drafts.append(job.rule.draft(job.decoder.unembed(exit_states[-1])[0, 0]))
        exit_states.append(_run_to_exit(job, drafts[-1:], cache))
    return drafts, torch.cat(exit_states, dim=1)


def _run_to_exit(job: Job, tokens: Sequence[int], cache: DecoderCache) -> Tensor:
    """Blocks 0..E-1 over new tokens -> exit states [1, T, D]."""
    hidden_1TD = job.decoder.embed(torch.tensor([tokens], device=job.decoder.device))
    return job.decoder.run_blocks(hidden_1TD, start=0, stop=job.exit_layer, cache=cache)


def _run_from_exit(job: Job, exit_states_1TD: Tensor, cache: DecoderCache) -> Tensor:
    """Blocks E..L-1 over kept exit states -> pre-norm hidden states [1, T, D]."""
    return job.decoder.run_blocks(exit_states_1TD, start=job.exit_layer, stop=job.decoder.num_layers, cache=cache)
