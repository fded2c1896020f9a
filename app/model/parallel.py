"""Weights spread over ranks by FSDP2 and tensor parallelism: shard a training module, and gather the whole once.

Legend of a mesh: `replicate` copies of the sharded model (HSDP), `data_parallel` shards, `tensor_parallel` parts of a
block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from app.model.tensor_parallel import LocalParameters, split

REPLICATE, DATA_PARALLEL, TENSOR_PARALLEL = "replicate", "data_parallel", "tensor_parallel"
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def parallelize(
    module: nn.Module, model: PreTrainedModel, mesh: DeviceMesh, *, compute_dtype: torch.dtype | None = None
) -> None:
    """Spread a model over a mesh in place, with or without memory: split its blocks, then shard what is left.

    Args:
        module: Lightning's, with the model in it.
        model: A Llama-shaped causal LM.
        mesh: With the dimensions `data_parallel`, `tensor_parallel` and, if wanted, `replicate`.
        compute_dtype: As for `shard`.

    Raises:
        ConfigError: The blocks cannot be split over that many tensor-parallel ranks.
    """
    names = mesh.mesh_dim_names or ()
    if TENSOR_PARALLEL in names and mesh[TENSOR_PARALLEL].size() > 1:
        split(model, mesh[TENSOR_PARALLEL])
    replicated = REPLICATE in names and mesh[REPLICATE].size() > 1
    data_mesh = mesh[REPLICATE, DATA_PARALLEL] if replicated else mesh[DATA_PARALLEL]
    shard(module, blocks=model.get_decoder().layers, mesh=data_mesh, compute_dtype=compute_dtype)


def shard(
    module: nn.Module, *, blocks: Iterable[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype | None = None
) -> None:
    """Spread the parameters over the mesh in place: each block is gathered when it runs, all others for a whole step.

    The root is the module whose methods are the steps, not the model in it: a step calls parts of the model, and only
    what runs inside the root's forward finds the embedding, the final norm and the head (tied or not) gathered.

    Args:
        module: Lightning's, with the model in it.
        blocks: The model's decoder blocks.
        mesh: Data-parallel ranks: shards, or copies by shards.
        compute_dtype: What parameters are gathered in and computed with; shards keep theirs, and gradients are summed
            over ranks in float32. None: that of the shards.
    """
    policy = MixedPrecisionPolicy()
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
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
        with _unsplit(module):
            yield
    finally:
        for group, mesh_info in zip(groups, resharding, strict=True):
            group.post_forward_mesh_info = mesh_info
        for submodule, state in zip(sharded, states, strict=True):
            if state._is_root:
                submodule.reset_iter_state()  # reshards all, even if an exception cut a block's forward short


@contextmanager
def _unsplit(module: nn.Module) -> Iterator[None]:
    """Whole parameters on every tensor-parallel rank inside the block."""
    split_here = [submodule for submodule in module.modules() if isinstance(submodule, LocalParameters)]
    before = [dict(submodule.named_parameters(recurse=False)) for submodule in split_here]
    whole: dict[DTensor, nn.Parameter] = {}  # tied ones once
    try:
        for submodule, parameters in zip(split_here, before, strict=True):
            submodule.ranks.on = False
            for name, parameter in parameters.items():
                if isinstance(parameter, DTensor):
                    if parameter not in whole:
                        whole[parameter] = nn.Parameter(parameter.full_tensor().detach(), parameter.requires_grad)
                    setattr(submodule, name, whole[parameter])
        yield
    finally:
        for submodule, parameters in zip(split_here, before, strict=True):
            submodule.ranks.on = True
            for name, parameter in parameters.items():
                setattr(submodule, name, parameter)
