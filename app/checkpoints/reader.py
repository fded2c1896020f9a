"""Whole tensors as torch.distributed.checkpoint reads shards: every rank takes its parts, however it is spread."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future


class WholeReader(StorageReader):
    """Reads from tensors that are there on every rank, mapped from a file for instance: only what is taken is read.

    Args:
        tensors: By key.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Every tensor is one part."""
        entries: dict[str, metadata.STORAGE_TYPES] = {
            key: metadata.TensorStorageMetadata(
                metadata.TensorProperties(dtype=tensor.dtype),
                tensor.shape,
                [metadata.ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.shape)],
            )
            for key, tensor in self._tensors.items()
        }
        return metadata.Metadata(entries)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the parts this rank asked for."""
        for item in plan.items:
            part = self._tensors[item.storage_index.fqn]
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, offset, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    # What a place on a disk would need.

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing."""

    def set_up_storage_reader(
        self, metadata: metadata.Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        """There is no place."""
        return False
