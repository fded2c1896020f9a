"""Spreads the weights of a training module over ranks by FSDP2 and tensor parallelism, and gathers them.

Dimensions of a mesh: `replicate` copies of the sharded model (HSDP), `data_parallel` shards, `tensor_parallel` parts
of a block. Tested by tests/distributed/test_sharding.py and test_tensor_parallel.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from app.model.tensor_parallel import LocalParameters, split

REPLICATE, DATA_PARALLEL, TENSOR_PARALLEL = "replicate", "data_parallel", "tensor_parallel"
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def parallelize(
    module: nn.Module, model: PreTrainedModel, mesh: DeviceMesh, *, compute_dtype: torch.dtype | None = None
) -> None:
    """Split the blocks of a model over a mesh, then shard all parameters, in place; the model may have no memory yet.

    A block is gathered when it runs, all other parameters for a whole step. FSDP's root is the LightningModule, whose
    methods are the steps: a step calls parts of the model, and only what runs inside the root's forward finds the
    embedding, the final norm and the head gathered.

    Args:
        model: A Llama-shaped causal LM; ConfigError if its blocks cannot be split over the tensor-parallel ranks.
        mesh: A mesh with the dimension `data_parallel`, and maybe `tensor_parallel` and `replicate`.
        compute_dtype: Type that parameters are gathered and computed in, None for their own; gradients are summed over
            ranks in float32.
    """
    names = mesh.mesh_dim_names or ()
    if TENSOR_PARALLEL in names and mesh[TENSOR_PARALLEL].size() > 1:
        split(model, mesh[TENSOR_PARALLEL])
    replicated = REPLICATE in names and mesh[REPLICATE].size() > 1
    data_mesh = mesh[REPLICATE, DATA_PARALLEL] if replicated else mesh[DATA_PARALLEL]
    policy = MixedPrecisionPolicy()
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for part in (*model.get_decoder().layers, module):
        fully_shard(part, mesh=data_mesh, mp_policy=policy)
    for step in _STEPS:
        register_fsdp_forward_method(module, step)


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Give every rank the whole weights inside the `with` block; does nothing without FSDP2.

    Entering gathers every parameter once, so all ranks enter together, between two steps. Inside, nothing is
    communicated: ranks may run different numbers of forwards, or none, and leave at different times. The weights are
    plain tensors in FSDP's compute dtype, whose memory is gone after the block. Every rank needs room for the model.
    """
    sharded = [submodule for submodule in module.modules() if isinstance(submodule, FSDPModule)]
    states = [submodule._get_fsdp_state() for submodule in sharded]
    for state in states:  # the outermost first, since the first one initialised takes itself for the root
        state._lazy_init()
    groups = [group for state in states for group in state._fsdp_param_groups]
    resharding = [group.post_forward_mesh_info for group in groups]
    try:
        for group in groups:  # as set_reshard_after_forward(False) does, which cannot be undone
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
                submodule.reset_iter_state()  # reshards all, even where an exception ended a block's forward


@contextmanager
def _unsplit(module: nn.Module) -> Iterator[None]:
    split_here = [submodule for submodule in module.modules() if isinstance(submodule, LocalParameters)]
    before = [dict(submodule.named_parameters(recurse=False)) for submodule in split_here]
    whole: dict[DTensor, nn.Parameter] = {}  # tied parameters are gathered once
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
