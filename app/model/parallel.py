"""Weights spread over ranks by FSDP2: shard a training module, and gather the whole once for free use in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from app.errors import ConfigError

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def shard(module: nn.Module, *, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Spread the parameters over the mesh in place: each block is gathered when it runs, all others for a whole step.

    The root is the module whose methods are the steps, not the model in it: a step calls parts of the model, and only
    what runs inside the root's forward finds the embedding, the final norm and the head (tied or not) gathered.

    Args:
        module: Lightning's, with the model in it.
        blocks: The model's decoder blocks.
        mesh: Data-parallel ranks, one-dimensional.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for step in _STEPS:
        register_fsdp_forward_method(module, step)


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Whole weights on every rank inside the block, shards as before after it; does nothing without FSDP2.

    Entering gathers every parameter once, so all ranks enter together, between two steps. Inside nothing is
    communicated: ranks may run different numbers of forwards, or none, and leave at different times. Weights are
    plain tensors then, in the compute dtype of FSDP's mixed precision where that is on (the shards keep their own).
    Take views of them inside only: afterwards their memory is gone. Needs room for one whole model on every rank.

    Args:
        module: FSDP's root, or what holds it.

    Raises:
        ConfigError: Weights are split by tensor parallelism too; its ranks could only run together.
    """
    sharded = [submodule for submodule in module.modules() if isinstance(submodule, FSDPModule)]
    states = [submodule._get_fsdp_state() for submodule in sharded]
    for state in states:  # the outermost first: a block that ran before its root would take itself for the root
        state._lazy_init()
    groups = [group for state in states for group in state._fsdp_param_groups]
    resharding = [group.post_forward_mesh_info for group in groups]
    try:
        for group in groups:  # as set_reshard_after_forward(False), which cannot give back what was set
            group.post_forward_mesh_info = None
        for submodule in sharded:
            submodule.unshard()
        if split := sum(isinstance(parameter, DTensor) for parameter in module.parameters()):
            got = f"{split} split parameters"
            raise ConfigError("tensor_parallel_size", got=got, allowed="1 where single ranks use the weights")
        yield
    finally:
        for group, mesh_info in zip(groups, resharding, strict=True):
            group.post_forward_mesh_info = mesh_info
        for submodule, state in zip(sharded, states, strict=True):
            if state._is_root:
                submodule.reset_iter_state()  # reshards all, even if an exception cut a block's forward short
