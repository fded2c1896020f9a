"""Which of Lightning's strategies train this model, said before processes start, and what their "auto" means."""

from __future__ import annotations

import logging
import os
from typing import Any

from jsonargparse import Namespace, dict_to_namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from app.errors import ConfigError
from app.training.strategy import MeshStrategy, mesh_sizes

_PATH = "trainer.strategy"
_SHARDED = f"app.training.strategy.{MeshStrategy.__name__}"  # imported here, so that its name alone will do
_REFUSED = {
    "fsdp": "FSDP1 renames the classes that layer dropout swaps",
    "deepspeed": "it takes the step over from the module, and its checkpoints are pickles",
}

_log = logging.getLogger(__name__)


def check_strategy(trainer: Namespace) -> None:
    """Refuse a strategy that cannot train here, or a mesh that its devices do not fill.

    Args:
        trainer: The parsed settings. In the place of Lightning's ModelParallelStrategy comes MeshStrategy: it takes the
            same settings, and its checkpoints are whole or absent and hold nothing that a reader would unpickle.

    Raises:
        ConfigError: Naming what to use instead, or both numbers.
    """
    name = name_of(trainer["strategy"])
    for kind, reason in _REFUSED.items():
        if name.lower().startswith(kind):
            fix = f"{reason}; configs/trainer/fsdp2.yaml has {_SHARDED}"
            raise ConfigError(_PATH, got=name, allowed="auto | ddp | MeshStrategy", fix=fix)
    settings = mesh_settings(trainer["strategy"])
    if settings is None:
        return
    if name != MeshStrategy.__name__ or isinstance(
        trainer["strategy"], str
    ):  # a name alone is parsed as a name of Lightning's
        trainer["strategy"] = dict_to_namespace({"class_path": _SHARDED, "init_args": settings})
    if (world_size := world_size_of(trainer)) is not None:
        mesh_of(settings, num_nodes=trainer["num_nodes"], world_size=world_size)


def check_launch(trainer: Namespace) -> None:
    """Refuse another number of processes than torchrun or srun started.

    Args:
        trainer: The parsed settings.

    Raises:
        ConfigError: With both numbers.
    """
    devices, num_nodes = world_size_of(trainer, num_nodes=1), trainer["num_nodes"]
    if devices is None:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ and (started := int(os.environ["WORLD_SIZE"])) != devices * num_nodes:
        got = f"{devices} with trainer.num_nodes {num_nodes}"
        fix = "--nnodes and --nproc-per-node of torchrun are to be trainer.num_nodes and trainer.devices"
        raise ConfigError("trainer.devices", got=got, allowed=f"{started} in all, as torchrun started", fix=fix)
    if not SLURMEnvironment.detect():
        cores = os.cpu_count() or devices
        if trainer["accelerator"] == "cpu" and devices > cores:
            _log.warning("trainer.devices: %d processes on %d CPU cores will wait for one another", devices, cores)
        return
    for field, ours, variable in (
        ("devices", devices, "SLURM_NTASKS_PER_NODE"),
        ("num_nodes", num_nodes, "SLURM_NNODES"),
    ):
        if (started := int(os.environ.get(variable, ours))) != ours:
            fix = "--ntasks-per-node and --nodes of the job are to be trainer.devices and trainer.num_nodes"
            raise ConfigError(f"trainer.{field}", got=ours, allowed=f"{started}, as {variable} says", fix=fix)


def name_of(strategy: Any) -> str:
    """A strategy's name as the user gave it, without the modules of a class."""
    return str(strategy["class_path"] if isinstance(strategy, Namespace) else strategy).rpartition(".")[2]


def settings_of(strategy: Any) -> Any:
    """Its arguments, the parsed ones themselves."""
    return (isinstance(strategy, Namespace) and strategy.get("init_args")) or {}


def mesh_settings(strategy: Any) -> dict[str, Any] | None:
    """MeshStrategy's arguments, also in the words of Lightning's ModelParallelStrategy; None of any other's."""
    if name_of(strategy) not in (MeshStrategy.__name__, "ModelParallelStrategy"):
        return None
    settings = {"replicate_size": 1, "data_parallel_size": "auto", "tensor_parallel_size": 1} | dict(
        settings_of(strategy)
    )
    if settings["tensor_parallel_size"] == "auto":  # Lightning's default; ours is to split no block unasked
        settings["tensor_parallel_size"] = 1
    return settings


def mesh_of(settings: Any, *, num_nodes: int, world_size: int) -> tuple[int, int, int]:
    """MeshStrategy's copies, shards and tensor-parallel ranks.

    Raises:
        ConfigError: They do not multiply to the number of devices.
    """
    try:
        return mesh_sizes(
            world_size,
            num_nodes=num_nodes,
            replicate=settings["replicate_size"],
            data_parallel=settings["data_parallel_size"],
            tensor_parallel=settings["tensor_parallel_size"],
        )
    except ConfigError as error:
        path = f"{_PATH}.init_args.{error.field}"
        raise ConfigError(path, got=error.got, allowed=error.allowed, fix=error.fix) from error


def world_size_of(trainer: Namespace, *, num_nodes: int | None = None) -> int | None:
    """Devices of all nodes, or of so many; None where only the machines know."""
    devices = trainer["devices"]
    count = str(len(devices) if isinstance(devices, list) else devices)  # the command line gives digits as text
    return (num_nodes or trainer["num_nodes"]) * int(count) if count.isdigit() else None
