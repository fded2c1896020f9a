"""Batches of rows of like length, as a pure function of (seed, step): little padding, and nothing to remember.

An epoch is a permutation of the rows, cut into the batches of its optimizer steps, as equal in number as can be, so
that every row comes exactly once and no batch is a small remainder. Before the cut, each pool of some consecutive
batches is sorted by length; after it, the batches of the epoch are shuffled. A step's batch is dealt out row by row to
its micro-batches of all ranks: they are of like length, and the same however they are spread over ranks and
accumulation.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from app.errors import DataError
from datamodules.loading.rank_share import RankShare

_POOL_BATCHES = 64
_MIN_POOLS = 4  # in an epoch: sorted as a whole, a small one would be cut into the same batches every time


class BucketSampler(Sampler[list[int]]):
    """Micro-batches of row indices of one rank, from the next optimizer step, `step()`, to the end of the epoch.

    A micro-batch has at most `batch_size` rows. It may have a row less than others of its step, and so none where a
    step has fewer rows than micro-batches.

    Raises:
        DataError: There are fewer rows than micro-batches in a step.
    """

    def __init__(
        self, lengths: npt.NDArray[np.integer], *, batch_size: int, seed: int, share: RankShare, step: Callable[[], int]
    ) -> None:
        if len(lengths) < share.micro_batches:
            raise DataError(
                f"training rows ({len(lengths)}) are fewer than micro-batches of an optimizer step ("
                f"{share.micro_batches}: {share.num_replicas} devices x trainer.accumulate_grad_batches"
                f" {share.accumulate}); lower one of these, or add data"
            )
        self._num_steps = math.ceil(len(lengths) / (batch_size * share.micro_batches))
        self._lengths, self._seed, self._share, self._step = lengths, seed, share, step
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __iter__(self) -> Iterator[list[int]]:
        share, start = self._share, self._step()
        epoch = share.epoch_steps(self._num_steps)
        for step in range(start, start - start % epoch + epoch):
            rows = self.step_rows(step)
            for first in range(share.rank, share.micro_batches, share.num_replicas):
                yield rows[first :: share.micro_batches].tolist()

    def __len__(self) -> int:
        """Count the micro-batches of an epoch, before Lightning applies its limit."""
        return self._num_steps * self._share.accumulate

    def step_rows(self, step: int) -> npt.NDArray[np.int64]:
        """Return the rows of an optimizer step on all ranks, in ascending order of length."""
        epoch, index = divmod(step, self._num_steps)
        return self._epoch(epoch)[index]

    def _draw_epoch(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        generator = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(epoch,)))
        order = generator.permutation(len(self._lengths))
        edges = np.arange(self._num_steps + 1) * len(order) // self._num_steps
        pool_batches = max(1, min(_POOL_BATCHES, self._num_steps // _MIN_POOLS))
        for pool in np.split(order, edges[pool_batches:-1:pool_batches]):
            pool[:] = pool[np.argsort(self._lengths[pool], kind="stable")]  # a view: sorts this part of `order`
        batches = np.split(order, edges[1:-1])
        return [batches[index] for index in generator.permutation(self._num_steps)]
