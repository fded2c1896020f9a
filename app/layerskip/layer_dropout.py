"""Which samples skip which block: M(p) of LayerSkip (arXiv 2404.16710) section 4.1.1, per sample.

Masks come from stateless generators keyed by (seed, step, micro-batch): nothing to checkpoint, nothing drawn inside a
block. A resumed run draws what an uninterrupted one would have; one process, accumulating, draws what many ranks would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def keyed_generator(*key: int) -> Generator:
    """A CPU generator whose state depends on the integers of `key` alone, each of them fully mixed in."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def draw_kept_samples(
    rates: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    step: int,
    micro_batch: int,
) -> tuple[Tensor, ...]:
    """Draw, for every block, the samples that go through it; each sample is kept with probability 1 - p.

    How MANY samples a block keeps is drawn once for all micro-batches of a step, so on all ranks alike (the paper seeds
    every GPU alike, so that ranks wait for nobody and run the same blocks); WHICH ones is each micro-batch's own
    draw, so that no mask diversity is lost. In each micro-batch the samples are still independent Bernoulli(1 - p): a
    binomial count with a uniformly random subset is that law.

    Args:
        rates: p(l, t), one for each block, in [0, 1).
        batch_size: B, samples in this micro-batch.
        seed: Seed of the run.
        step: Optimizer step.
        micro_batch: Number of the micro-batch among all of the step: k W + r for the k-th of data-parallel rank r of W.

    Returns:
        For each block the kept sample indices, sorted, int64, shape [K] with 0 <= K <= B.
    """
    shared, own = keyed_generator(seed, step), keyed_generator(seed, step, micro_batch)
    kept = []
    for rate in rates:
        # Always draw, also at rate 0: block l's mask must not depend on the other blocks' rates.
        count = int((torch.rand(batch_size, generator=shared, dtype=torch.float64) >= rate).sum())
        kept.append(torch.randperm(batch_size, generator=own)[:count].sort().values)
    return tuple(kept)


def keep_scales(rates: Sequence[float], *, rescale: bool) -> tuple[float, ...]:
    """Factor on each kept residual branch: 1 (the paper), or 1/(1 - p) so that its expectation is unchanged."""
    return tuple(1.0 / (1.0 - rate) if rescale else 1.0 for rate in rates)
