"""The rows that a rank takes. Tested by tests/unit/datamodules/loading/test_length_buckets.py."""

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer

from app.data_ranks import data_ranks
from app.errors import DataError


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """The share of one data-parallel rank."""

    rank: int = 0
    num_replicas: int = 1  # W, the number of ranks with rows of their own
    accumulate: int = 1  # micro-batches of each rank in an optimizer step
    limit: int | float = 1.0  # Lightning's `limit_train_batches`: micro-batches (int), or a share of the epoch (float)

    @classmethod
    def of(cls, trainer: Trainer | None) -> "RankShare":
        """Read the share from a trainer; without one, a single process takes all rows."""
        if trainer is None:
            return cls()
        rank, num_replicas = data_ranks(trainer)
        return cls(
            rank=rank,
            num_replicas=num_replicas,
            accumulate=trainer.accumulate_grad_batches,
            limit=trainer.limit_train_batches,
        )

    @property
    def micro_batches(self) -> int:
        """M, the micro-batches of all ranks in an optimizer step."""
        return self.num_replicas * self.accumulate

    def epoch_steps(self, num_steps: int) -> int:
        """Apply the limit to an epoch of `num_steps` optimizer steps; a partial last step counts as one."""
        num_batches = num_steps * self.accumulate
        limited = min(num_batches, self.limit) if isinstance(self.limit, int) else num_batches * self.limit
        return max(1, math.ceil(int(limited) / self.accumulate))

    def equal_share(self, num_rows: int, *, fix: str) -> int:
        """Return the number of held-out rows that each rank takes, so that all ranks run equally many batches.

        DataError says that there are fewer rows than ranks, and `fix` how to get more.
        """
        if num_rows < self.num_replicas:
            raise DataError(f"held-out rows ({num_rows}) are fewer than devices ({self.num_replicas}); {fix}")
        return num_rows // self.num_replicas
