"""Which of Lightning's strategies train this model, with which mesh. Tested by tests/contract/test_strategies.py."""

import logging
import os
from typing import Any

from jsonargparse import Namespace, dict_to_namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import StrategyRegistry

from app.errors import ConfigError
from app.training.strategy import MeshStrategy, mesh_sizes

_PATH = "trainer.strategy"
_SHARDED = f"app.training.strategy.{MeshStrategy.__name__}"  # imported here so that users may give its bare name
_SHARDED_FIX = f"configs/trainer/fsdp2.yaml has {_SHARDED}"
_FORKED = "processes that fork or spawn this one hold its locks and threads; ddp starts them afresh"
_REFUSED = {
    "fsdp": f"FSDP1 renames the classes that layer dropout swaps; {_SHARDED_FIX}",
    "deepspeed": f"it takes the step over from the module, and its checkpoints are pickles; {_SHARDED_FIX}",
    "ddp_fork": _FORKED,
    "ddp_notebook": _FORKED,
    "ddp_spawn": _FORKED,
}

_log = logging.getLogger(__name__)


def check_strategy(trainer: Namespace) -> None:
    """Refuse a strategy that cannot train this model, or a mesh that the devices do not fill.

    Lightning's ModelParallelStrategy is replaced by MeshStrategy in `trainer`: it takes the same settings, and its
    checkpoints are whole or absent and hold no pickles.
    """
    name = name_of(trainer["strategy"])
    for kind, reason in _REFUSED.items():
        if name.lower().startswith(kind):
            raise ConfigError(_PATH, got=name, allowed="auto | ddp | MeshStrategy", fix=reason)
    if (start := settings_of(trainer["strategy"]).get("start_method") or "popen") != "popen":
        raise ConfigError(f"{_PATH}.init_args.start_method", got=start, allowed="popen", fix=_FORKED)
    settings = mesh_settings(trainer["strategy"])
    if settings is None:
        if isinstance(trainer["strategy"], str) and name not in ("auto", *StrategyRegistry.available_strategies()):
            fix = "a class is given as {class_path: lightning.pytorch.strategies.NAME}"
            raise ConfigError(_PATH, got=trainer["strategy"], allowed="auto | ddp | MeshStrategy", fix=fix)
        return
    # A bare name is parsed as the name of a strategy of Lightning's.
    if name != MeshStrategy.__name__ or isinstance(trainer["strategy"], str):
        trainer["strategy"] = dict_to_namespace({"class_path": _SHARDED, "init_args": settings})
    if (world_size := world_size_of(trainer)) is not None:
        mesh_of(settings, num_nodes=trainer["num_nodes"], world_size=world_size)


def check_launch(trainer: Namespace) -> None:
    """Refuse settings that ask for another number of processes than torchrun or srun started."""
    devices, num_nodes = world_size_of(trainer, num_nodes=1), trainer["num_nodes"]
    if devices is None:
        return
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if not environment.detect():
            continue
        try:  # Lightning itself asks this only where it launches processes
            environment().validate_settings(num_devices=devices, num_nodes=num_nodes)
        except ValueError as error:
            got = f"{devices} with trainer.num_nodes {num_nodes}"
            raise ConfigError("trainer.devices", got=got, allowed="as many as were started", fix=str(error)) from error
    cores = os.cpu_count() or devices
    if trainer["accelerator"] == "cpu" and devices > cores:
        _log.warning("trainer.devices: %d processes on %d CPU cores will wait for one another", devices, cores)


def name_of(strategy: Any) -> str:
    """Return the name of a strategy as the user gave it, without the module of a class."""
    return str(strategy["class_path"] if isinstance(strategy, Namespace) else strategy).rpartition(".")[2]


def settings_of(strategy: Any) -> Any:
    """Return the parsed arguments of a strategy; empty if it was given by name."""
    return (isinstance(strategy, Namespace) and strategy.get("init_args")) or {}


def mesh_settings(strategy: Any) -> dict[str, Any] | None:
    """Return the arguments of MeshStrategy or of Lightning's ModelParallelStrategy; None for any other strategy."""
    if name_of(strategy) not in (MeshStrategy.__name__, "ModelParallelStrategy"):
        return None
    settings = {"replicate_size": 1, "data_parallel_size": "auto", "tensor_parallel_size": 1} | dict(
        settings_of(strategy)
    )
    if settings["tensor_parallel_size"] == "auto":  # Lightning's default, which would split blocks unasked
        settings["tensor_parallel_size"] = 1
    return settings


def mesh_of(settings: Any, *, num_nodes: int, world_size: int) -> tuple[int, int, int]:
    """Return the sizes of the mesh, whose product is the number of devices: copies, shards, tensor-parallel ranks."""
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
    """Return the number of devices on `num_nodes` nodes, by default all; None if only the machines know it."""
    devices = trainer["devices"]
    count = str(len(devices) if isinstance(devices, list) else devices)  # the command line gives digits as text
    return (num_nodes or trainer["num_nodes"]) * int(count) if count.isdigit() else None
