"""Directories that all ranks write together, whole or absent, if wanted while training goes on."""

from __future__ import annotations

import io
import logging
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from typing_extensions import override

from app.checkpoints.atomic import partial_of
from app.checkpoints.checkpoint_io import AtomicCheckpointIO
from app.checkpoints.contents import (
    OptimizerState,
    by_name,
    by_position,
    filled,
    made_whole,
    parameter_names,
    parameter_of,
    read_directory,
    read_file,
    state_keys,
    without_tensors,
)
from app.checkpoints.integrity import KEEP_PREVIOUS
from app.checkpoints.reader import WholeReader
from app.checkpoints.shards import METADATA_FILE, ShardReader, Shards, read_metadata
from app.checkpoints.weights import OPTIMIZER_STATES, STATE_DICT
from app.checkpoints.writer import CheckpointWriter
from app.errors import CheckpointError

_log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[torch.Size, torch.dtype]]


class ShardedCheckpoints(ModelParallelStrategy):
    """Lightning's strategy for models spread over ranks, with checkpoints of ours.

    A directory resumes on any number of ranks, and so does a single file of DDP or one device. Lightning's own writer
    writes over the checkpoint that stands, and its reader unpickles what it finds.

    Args:
        asynchronous: Go on training while a checkpoint is written from a copy in main memory; a failure is told at the
            next one, or at the end.
        save_distributed_checkpoint: Write directories; single files otherwise.
        **settings: As for ModelParallelStrategy.
    """

    def __init__(
        self, *, asynchronous: bool = False, save_distributed_checkpoint: bool = True, **settings: Any
    ) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **settings)
        self._in_directories = save_distributed_checkpoint
        self._asynchronous = asynchronous
        self._saving: Future[Any] | None = None
        self._saving_to = Path()
        self._to_remove: list[Path] = []
        self._group: dist.ProcessGroup | None = None
        self._failed = False

    # -- saving ------------------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Every rank's own part of the weights, not copied; or all of them, on rank 0."""
        if not self._in_directories:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As the optimizer's, every rank's own part, not copied; or all of it, on rank 0."""
        state = (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        return state if self._in_directories else tree_map(self._whole_on_rank_0, state)

    def _whole_on_rank_0(self, value: Any) -> Any:
        if isinstance(value, DTensor):
            value = value.full_tensor()
        return value.cpu() if isinstance(value, Tensor) and self.is_global_zero else value

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a directory, all ranks together; whatever stood there survives a failure.

        Raises:
            CheckpointError: If it cannot be written on some rank, on all of them; or the one before could not.
        """
        self.finish_saving()
        path = Path(self.broadcast(str(filepath)))
        if not self._in_directories:
            super(ModelParallelStrategy, self).save_checkpoint(checkpoint, path, storage_options)
            return
        tensors = self._take_tensors(checkpoint)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        writer = CheckpointWriter(
            path,
            content=content.getbuffer(),
            step=checkpoint["global_step"],
            keep_previous=bool((storage_options or {}).get(KEEP_PREVIOUS)),
        )
        if self.is_global_zero:
            writer.clear()
        if self._group is None:  # not the one of training, which goes on, and not of GPUs
            self._group = dist.new_group(backend="gloo")
        dist.barrier(self._group)
        self._saving_to = path
        if self._asynchronous:
            pending = async_save(tensors, storage_writer=writer, process_group=self._group)
            assert isinstance(pending, Future)
            self._saving = pending
        else:
            with self._told():
                save(tensors, storage_writer=writer, process_group=self._group)

    def _take_tensors(self, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
        """All tensors of weights and optimizers, out of a checkpoint, under their keys in shards."""
        assert self.model is not None
        tensors = {f"{STATE_DICT}.{name}": tensor for name, tensor in checkpoint.pop(STATE_DICT).items()}
        states = []
        for index, (state, optimizer) in enumerate(
            zip(checkpoint.get(OPTIMIZER_STATES, ()), self.optimizers, strict=False)
        ):
            plain, of_optimizer = without_tensors(by_name(state, parameter_names(self.model, optimizer)), index)
            states.append(plain)
            tensors |= of_optimizer
        checkpoint[OPTIMIZER_STATES] = states
        return tensors

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, if one is; then remove those it replaces.

        Raises:
            CheckpointError: If it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._told():
                saving.result()
        to_remove, self._to_remove = self._to_remove, []
        for path in to_remove:
            super().remove_checkpoint(path)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """An error of some rank, on all ranks, in one line; the disk is freed."""
        try:
            yield
        except CheckpointException as error:  # no subclass of Exception
            if self.is_global_zero:
                shutil.rmtree(partial_of(self._saving_to), ignore_errors=True)
            raise CheckpointError(
                f"cannot write checkpoint {self._saving_to}: {_reasons(error)}; earlier checkpoints are untouched"
            ) from error

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove one, but not before the one being written is there to take its place."""
        if self._saving is None:
            super().remove_checkpoint(filepath)
        else:
            self._to_remove.append(Path(filepath))

    @override
    def on_exception(self, exception: BaseException) -> None:
        """That of training is to be told, not one of the checkpoint."""
        super().on_exception(exception)
        self._failed = True

    @override
    def teardown(self) -> None:
        """Finish what is being written."""
        try:
            self.finish_saving()
        except CheckpointError as error:
            if not self._failed:
                raise
            _log.warning("%s", error)
        finally:
            super().teardown()

    # -- loading -----------------------------------------------------------------------------------------------------

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore weights and optimizer states, and give back the rest; from a directory or a single file.

        Raises:
            CheckpointError: If it is missing, damaged, foreign, or holds anything but tensors and plain values.
        """
        self.finish_saving()
        assert isinstance(self.checkpoint_io, AtomicCheckpointIO)
        path = self.checkpoint_io.whole(Path(self.broadcast(str(checkpoint_path))))
        assert self.lightning_module is not None
        reader: StorageReader
        if path.is_dir():
            content, shards = read_directory(path)
            shapes: Shapes = shards.shapes
            described = made_whole(path, content, shapes, lambda key: _described(key, shards))
            self.lightning_module.on_load_checkpoint(described)  # what does not fit, by its name
            reader = ShardReader(path, read_metadata(path / METADATA_FILE))
        else:
            content = read_file(path, mmap=True)
            self.lightning_module.on_load_checkpoint(content)
            whole = self._take_tensors(content)
            shapes, reader = {key: (tensor.shape, tensor.dtype) for key, tensor in whole.items()}, WholeReader(whole)
        self._restore(path, content[OPTIMIZER_STATES], shapes, reader)
        return content

    def _restore(self, path: Path, states: list[OptimizerState], shapes: Shapes, reader: StorageReader) -> None:
        """Read this rank's parts into the weights where they are, and into new optimizer states."""
        assert self.model is not None
        wanted: dict[str, Any] = {
            f"{STATE_DICT}.{name}": tensor for name, tensor in get_model_state_dict(self.model).items()
        }
        parameters = dict(self.model.named_parameters())
        for index, optimizer in enumerate(self.optimizers[: len(states)]):
            names = [name for group in states[index]["param_groups"] for name in group["params"]]
            if names != parameter_names(self.model, optimizer):
                raise CheckpointError(f"checkpoint {path}: its optimizer has other parameters, or in another order")
            for key in state_keys(shapes, index):
                parameter = parameters[parameter_of(key, index)]
                wanted[key] = _empty_like(parameter, *shapes[key])
        if missing := wanted.keys() - shapes.keys():
            raise CheckpointError(f"checkpoint {path}: {min(missing)} is missing ({len(missing)} of them)")
        try:
            load(wanted, storage_reader=reader)
        except CheckpointException as error:  # no subclass of Exception
            raise CheckpointError(f"cannot read checkpoint {path}: {_reasons(error)}") from error
        for index, optimizer in enumerate(self.optimizers[: len(states)]):
            tensors = {key: wanted[key] for key in state_keys(wanted, index)}
            optimizer.load_state_dict(by_position(filled(states[index], tensors, index)))


def _reasons(error: CheckpointException) -> str:
    """Of every rank that failed, in one line."""
    failures = sorted(error.failures.items())
    return "; ".join(f"rank {rank}: {textwrap.shorten(str(reason), 200)}" for rank, (reason, _) in failures)


def _described(key: str, shards: Shards) -> Tensor:
    """A tensor to look at: a single number as it is, others without memory."""
    shape, dtype = shards.shapes[key]
    return shards.read(key) if shape.numel() == 1 else torch.empty(shape, dtype=dtype, device="meta")


def _empty_like(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Room for a state of a parameter: spread as it is if it has its shape, else the same on all ranks."""
    if isinstance(parameter, DTensor) and shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)
