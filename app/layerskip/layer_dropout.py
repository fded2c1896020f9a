"""Which samples skip which block: M(p) of LayerSkip (arXiv 2404.16710) section 4.1.1, per sample.

Masks come from stateless generators keyed by (seed, step, micro-batch), outside the blocks. So nothing is saved, a
resumed run draws what an uninterrupted one would, and one process that accumulates draws what many ranks would.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor


def keyed_generator(*key: int) -> Generator:
    """A CPU generator whose state depends on the integers of `key` alone, each of them fully mixed in."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


class KeptSamples(NamedTuple):
    """Which samples of a micro-batch go through which block."""

    by_block: tuple[Tensor, ...]  # sorted indices of the kept samples, int64 [K] with 0 <= K <= B
    most: tuple[int, ...]  # K of the largest micro-batch at hand; where it is 0, no rank needs the block


def draw_kept_samples(
    rates: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    step: int,
    micro_batch: int,
    largest_batch: int | None = None,
) -> KeptSamples:
    """Draw, for every block, the samples that go through it; each sample is kept with probability 1 - p.

    HOW MANY samples a block keeps is drawn once for all micro-batches of a step, and so alike on all ranks: the paper
    seeds every GPU alike, so that all run the same blocks and none waits. WHICH samples are kept is each micro-batch's
    own draw, so that masks stay diverse. In each micro-batch the samples are still independent Bernoulli(1 - p), since
    that is the distribution of a uniformly random subset of binomial size. A smaller micro-batch counts the first of
    the same numbers: it keeps at most as many as a larger one, and fewer by at most as many as it has fewer samples.

    Args:
        rates: p(l, t), one for each block, in [0, 1).
        batch_size: B, samples in this micro-batch.
        micro_batch: Number of the micro-batch in the step: k W + r for the k-th of data-parallel rank r of W.
        largest_batch: Samples in the largest of the W micro-batches at hand, >= B; B by default.
    """
    shared, own = keyed_generator(seed, step), keyed_generator(seed, step, micro_batch)
    # Drawn row by row, a sample's numbers depend neither on how many samples follow nor on any block's rate.
    uniform = torch.rand(max(batch_size, largest_batch or 0), len(rates), generator=shared, dtype=torch.float64)
    goes_through = uniform >= torch.tensor(rates, dtype=torch.float64)
    counts, most = goes_through[:batch_size].sum(dim=0).tolist(), goes_through.sum(dim=0).tolist()
    by_block = (torch.randperm(batch_size, generator=own)[:count].sort().values for count in counts)
    return KeptSamples(tuple(by_block), tuple(most))


def keep_scales(rates: Sequence[float], *, rescale: bool) -> tuple[float, ...]:
    """Factor on each kept residual branch: 1 (the paper), or 1/(1 - p), which leaves its expectation unchanged."""
    return tuple(1.0 / (1.0 - rate) if rescale else 1.0 for rate in rates)
