"""Writes and reads checkpoint directories of shards. Tested by tests/distributed/test_checkpoints.py."""

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
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from app.checkpoints import contents
from app.checkpoints.atomic import partial_path
from app.checkpoints.checkpoint_io import AtomicCheckpointIO
from app.checkpoints.integrity import check_finite
from app.checkpoints.shards import ShardReader, Shards, copy_own_part
from app.checkpoints.states import is_torchs
from app.checkpoints.weights import OPTIMIZER_STATES, STATE_DICT, Shapes
from app.checkpoints.writer import CheckpointWriter
from app.errors import CheckpointError

_log = logging.getLogger(__name__)


class ShardedCheckpoints(ModelParallelStrategy):
    """Lightning's strategy for models spread over ranks, with checkpoints that are whole or absent and never unpickled.

    A run resumes from a directory on any number of ranks, and from a single file of DDP or one device.

    Args:
        asynchronous: Go on training while a copy of the checkpoint in main memory is written. A failure is raised when
            the next checkpoint is saved, or at the end.
        save_distributed_checkpoint: Write directories, else single files.
        **settings: Those of ModelParallelStrategy.
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

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """For a directory, this rank's part of the weights, not copied; for a file, all weights, on rank 0."""
        if not self._in_directories:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        return state if self._in_directories else tree_map(self._whole_on_rank_0, state)

    def _whole_on_rank_0(self, value: Any) -> Any:
        if isinstance(value, DTensor):
            value = value.full_tensor()
        return value.cpu() if isinstance(value, Tensor) and self.is_global_zero else value

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, all ranks together; the one that has the name survives a failure.

        If it or the one before cannot be written on some rank, all ranks raise CheckpointError.
        """
        self.finish_saving()
        path = Path(self.broadcast(str(filepath)))
        if not self._in_directories:
            super(ModelParallelStrategy, self).save_checkpoint(checkpoint, path, storage_options)
            return
        plugin = self.checkpoint_io
        keep_previous = isinstance(plugin, AtomicCheckpointIO) and plugin.keeps_previous(path, storage_options)
        tensors = self._take_tensors(checkpoint)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        writer = CheckpointWriter(
            path, content=content.getbuffer(), step=checkpoint["global_step"], keep_previous=keep_previous
        )
        if self.is_global_zero:  # a killed or failed attempt may have left something
            shutil.rmtree(partial_path(path), ignore_errors=True)
        if self._group is None:  # a group of its own, since training uses the other one meanwhile
            self._group = dist.new_group(backend="gloo")
        dist.barrier(self._group)
        self._saving_to = path
        if self._asynchronous:
            pending = async_save(tensors, storage_writer=writer, process_group=self._group)
            assert isinstance(pending, Future)
            self._saving = pending
        else:
            with self._one_error():
                save(tensors, storage_writer=writer, process_group=self._group)

    def _take_tensors(self, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
        """Remove all tensors of weights and optimizers from a checkpoint; returns them by their keys in shards."""
        assert self.model is not None
        tensors = {f"{STATE_DICT}.{name}": tensor for name, tensor in checkpoint.pop(STATE_DICT).items()}
        states = []
        for index, (state, optimizer) in enumerate(
            zip(checkpoint.get(OPTIMIZER_STATES, ()), self.optimizers, strict=False)
        ):
            names = contents.parameter_names(self.model, optimizer)
            plain, of_optimizer = contents.to_shards(state, names, index)
            states.append(plain)
            tensors |= of_optimizer
        checkpoint[OPTIMIZER_STATES] = states
        return tensors

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, then remove those that it replaces; all ranks together."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._one_error():
                saving.result()
        to_remove, self._to_remove = self._to_remove, []
        for path in to_remove:
            super().remove_checkpoint(path)

    @contextmanager
    def _one_error(self) -> Iterator[None]:
        """Raise the errors of all ranks as one CheckpointError, and free the disk."""
        try:
            yield
        except CheckpointException as error:  # not a subclass of Exception
            if self.is_global_zero:
                shutil.rmtree(partial_path(self._saving_to), ignore_errors=True)
            raise CheckpointError(
                f"cannot write checkpoint {self._saving_to}: {_reasons(error)}; earlier checkpoints are untouched"
            ) from _first_cause(error)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint, but not before the one that is being written is complete."""
        if self._saving is None:
            super().remove_checkpoint(filepath)
        else:
            self._to_remove.append(Path(filepath))

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._failed = True

    def teardown(self) -> None:
        try:
            self.finish_saving()
        except CheckpointError as error:
            if not self._failed:
                raise
            _log.warning("%s", error)  # The error that ended training is the one to raise.
        finally:
            super().teardown()
            self.checkpoint_io.teardown()  # Lightning's other strategies do so themselves.

    # -- loading -----------------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore weights and optimizer states from a directory or a single file; returns the rest of it."""
        self.finish_saving()
        assert isinstance(self.checkpoint_io, AtomicCheckpointIO)
        path = self.checkpoint_io.verified(Path(self.broadcast(str(checkpoint_path))))
        assert self.lightning_module is not None
        if path.is_dir():
            content, shards = contents.read_directory(path)
            described = contents.made_whole(path, content, shards.shapes, lambda key: _described(key, shards))
            self.lightning_module.on_load_checkpoint(described)  # refuses what does not fit before anything is changed
            wanted = self._wanted(path, content[OPTIMIZER_STATES], shards.shapes)
            try:
                load(wanted, storage_reader=ShardReader(path))
            except CheckpointException as error:  # not a subclass of Exception
                raise CheckpointError(f"cannot read checkpoint {path}: {_reasons(error)}") from _first_cause(error)
        else:
            content = contents.read_file(path, mmap=True)
            of_tensors = {key: content[key] for key in (STATE_DICT, OPTIMIZER_STATES) if key in content}
            described = {**content, **tree_map(_without_memory, of_tensors)}
            self.lightning_module.on_load_checkpoint(described)
            content = {**described, **of_tensors}
            whole = self._take_tensors(content)
            shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in whole.items()}
            wanted = self._wanted(path, content[OPTIMIZER_STATES], shapes)
            with torch.no_grad():
                for key, tensor in wanted.items():
                    copy_own_part(tensor, whole[key])
        check_finite(path, self._with_known_meaning(wanted))
        for index, (optimizer, state) in enumerate(zip(self.optimizers, content[OPTIMIZER_STATES], strict=False)):
            tensors = {key: wanted[key] for key in contents.state_keys(wanted, index)}
            optimizer.load_state_dict(contents.from_shards(state, tensors, index))
        return content

    def _with_known_meaning(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of this rank's parts, those that must be finite; the states of a class other than torch's need not be."""
        foreign = [index for index, optimizer in enumerate(self.optimizers) if not is_torchs(optimizer)]
        left_out = {key for index in foreign for key in contents.state_keys(wanted, index)}
        return {key: tensor for key, tensor in wanted.items() if key not in left_out}

    def _wanted(self, path: Path, states: list[contents.OptimizerState], shapes: Shapes) -> dict[str, Any]:
        """The tensors to read into, by their keys in shards: this rank's parts of weights and new optimizer states."""
        assert self.model is not None
        wanted: dict[str, Any] = {
            f"{STATE_DICT}.{name}": tensor for name, tensor in get_model_state_dict(self.model).items()
        }
        parameters = dict(self.model.named_parameters())
        for index, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=False)):
            names = [name for group in state["param_groups"] for name in group["params"]]
            if names != contents.parameter_names(self.model, optimizer):
                raise CheckpointError(f"checkpoint {path}: its optimizer has other parameters, or in another order")
            for key in contents.state_keys(shapes, index):
                wanted[key] = _empty_state(parameters[contents.parameter_of(key, index)], *shapes[key])
        if missing := wanted.keys() - shapes.keys():
            raise CheckpointError(f"checkpoint {path}: {min(missing)} is missing ({len(missing)} of them)")
        return wanted


def _reasons(error: CheckpointException) -> str:
    failures = sorted(error.failures.items())
    return "; ".join(f"rank {rank}: {textwrap.shorten(str(reason), 200)}" for rank, (reason, _) in failures)


def _first_cause(error: CheckpointException) -> BaseException:
    """What the first rank that failed raised; torch does not chain the errors of ranks."""
    return error.failures[min(error.failures)][0]


def _described(key: str, shards: Shards) -> Tensor:
    """A tensor to compare with the live one: a single number with its value, any other without memory."""
    shape, dtype = shards.shapes[key]
    return shards.read(key) if shape.numel() == 1 else torch.empty(shape, dtype=dtype, device="meta")


def _without_memory(value: object) -> object:
    """The same of a tensor in a mapped file, and any other value as it is."""
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) and value.numel() != 1 else value


def _empty_state(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory for one state of a parameter: sharded as the parameter is if it has its shape, else whole on each rank."""
    if isinstance(parameter, DTensor) and shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)
