"""FSDP2, HSDP and tensor parallelism in one strategy. Tested by tests/distributed/test_meshes.py."""

from typing import Any, Literal

import torch
from lightning.pytorch.plugins import CheckpointIO, MixedPrecision, Precision
from torch.distributed.device_mesh import init_device_mesh

from app.checkpoints.checkpoint_io import AtomicCheckpointIO
from app.checkpoints.sharded import ShardedCheckpoints
from app.errors import ConfigError
from app.model.parallel import DATA_PARALLEL, REPLICATE, TENSOR_PARALLEL


class ShardPrecision(Precision):
    """bf16-mixed without autocast: FSDP2 gathers parameters in bfloat16 and frees them after each block."""

    precision = "bf16-mixed"
    compute_dtype = torch.bfloat16


class MeshStrategy(ShardedCheckpoints):
    """Spreads weights, gradients and optimizer states over the devices.

    Devices = replicate_size x data_parallel_size x tensor_parallel_size; neighbours are tensor parallel.

    Args:
        data_parallel_size: Devices that share one copy of the model by FSDP2, each with its own rows; "auto" is all
            that the other two leave.
        tensor_parallel_size: Devices that share each block and the same rows; within a node, for models or rows that
            are too large for a block on one device.
        replicate_size: Copies of the sharded model (HSDP), between which only gradients go. "auto" is one a node.
        **settings: Those of Lightning's ModelParallelStrategy.

    Raises:
        ConfigError: When processes start, if the sizes do not multiply to the number of devices.
    """

    def __init__(
        self,
        *,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        replicate_size: Literal["auto"] | int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(data_parallel_size=data_parallel_size, tensor_parallel_size=tensor_parallel_size, **settings)
        self._asked: dict[str, Literal["auto"] | int] = {
            "replicate": replicate_size,
            "data_parallel": data_parallel_size,
            "tensor_parallel": tensor_parallel_size,
        }

    @property
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:  # set in __init__, it would forbid the trainer another plugin
            self._checkpoint_io = AtomicCheckpointIO()
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        self._precision_plugin = ShardPrecision() if isinstance(plugin, MixedPrecision) else plugin

    @property
    def compute_dtype(self) -> torch.dtype | None:
        plugin = self.precision_plugin
        return plugin.compute_dtype if isinstance(plugin, ShardPrecision) else None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        mesh = self.device_mesh  # tensor-parallel ranks have the same data-parallel rank, and so the same rows
        shards = mesh[DATA_PARALLEL].size()
        rank = mesh.get_local_rank(REPLICATE) * shards + mesh.get_local_rank(DATA_PARALLEL)
        return {"num_replicas": mesh[REPLICATE].size() * shards, "rank": rank}

    def setup_environment(self) -> None:
        self._setup_distributed()
        sizes = mesh_sizes(self.world_size, num_nodes=self.num_nodes, **self._asked)
        names = (REPLICATE, DATA_PARALLEL, TENSOR_PARALLEL)
        self._device_mesh = mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)
        used = tuple(name for name, size in zip(names, sizes, strict=True) if size > 1 or name == DATA_PARALLEL)
        if len(used) > 1:
            mesh[used]._flatten("_".join(used))  # DTensor then sums over all of them in one collective
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh


def mesh_sizes(
    world_size: int,
    *,
    num_nodes: int,
    replicate: Literal["auto"] | int = 1,
    data_parallel: Literal["auto"] | int = "auto",
    tensor_parallel: Literal["auto"] | int = 1,
) -> tuple[int, int, int]:
    """The sizes of the mesh: copies, shards, parts; ConfigError unless their product is `world_size` devices."""
    copies = num_nodes if replicate == "auto" else replicate
    parts = 1 if tensor_parallel == "auto" else tensor_parallel
    for field, size in (("replicate_size", copies), ("tensor_parallel_size", parts)):
        if size < 1 or world_size % size:
            raise ConfigError(field, got=size, allowed=f"a divisor of {world_size}, the number of devices")
    left = world_size // (copies * parts)
    shards = left if data_parallel == "auto" else data_parallel
    if copies * shards * parts != world_size:
        product = f"{copies} x {shards} x {parts} = {copies * shards * parts}"
        allowed = f"replicate_size x data_parallel_size x tensor_parallel_size = {world_size}, the number of devices"
        raise ConfigError("data_parallel_size", got=product, allowed=allowed)
    return copies, shards, parts
