"""`layerskip plan`: what a config's run will take on given machines. Tested by tests/contract/test_plan.py."""

import json
import logging
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from app.cli.beside_fit import BesideFitCLI, run_beside_fit
from app.cli.early_checks import states_arguments
from app.cli.exit_block_plan import distillation_of, plan_cache, refuse_without_weights
from app.cli.messages import locate
from app.cli.strategies import mesh_of, mesh_settings, name_of, settings_of
from app.cli.tables import print_table
from app.errors import ConfigError, check_range
from app.model.lora import refused_strategy
from app.model_files.open import load_config
from app.planning.exit_blocks import plan_exit_blocks
from app.planning.memory import Layout
from app.planning.plan import Change, Machine, Plan, changes_that_fit, plan_training
from app.planning.recipe import Recipe
from app.planning.report import advice, plan_tables
from app.training.batch import check_row_length

_log = logging.getLogger(__name__)
# The type of the weights, and that of the products where it differs.
_PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "64-true": (torch.float64, None),
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
}
_SHORT = {"64": "64-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "None": "32-true"}
_ARCHITECTURE_FIRST = (
    "give its architecture before the file that continues it: --config configs/model/NAME.yaml --config ...;"
    " in that order it is planned as a model that is continued (fit takes one or the other)"
)
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})\s*")
# The trainer that is built on this machine. It trains nothing.
_HERE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Say what a config's run will take: memory, tokens, FLOPs, hours. No weights, data or GPU are needed.

    Args:
        num_nodes: Number of machines, instead of trainer.num_nodes.
        devices: Number of devices in each machine, instead of trainer.devices.
        device_memory: Memory of one device, such as 80GB (10^9) or 80GiB (2^30).
        peak_flops: FLOPs that one device does in a second in the run's precision, such as 989e12.
        utilisation: Share of peak_flops that the run reaches, in (0, 1].
    """

    num_nodes: int | None = None
    devices: int | None = None
    device_memory: str | None = None
    peak_flops: float | None = None
    utilisation: float = 0.4
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("num_nodes", "devices"):
            if (count := getattr(self, name)) is not None:
                check_range(name, count, low=1)
        if self.peak_flops is not None and not 0 < self.peak_flops < float("inf"):
            raise ConfigError("peak_flops", got=self.peak_flops, allowed="(0, inf)")
        if not 0 < self.utilisation <= 1:
            raise ConfigError("utilisation", got=self.utilisation, allowed="(0, 1]")
        self.machine()

    def machine(self) -> Machine:
        """Describe the device that is planned for; a ConfigError if `device_memory` is not a size."""
        memory = None
        if self.device_memory is not None:
            found = _SIZE.fullmatch(self.device_memory.upper())
            if not found or not float(found[1]):
                raise ConfigError("device_memory", got=self.device_memory, allowed="a size, such as 80GB or 80GiB")
            memory = float(found[1]) * _UNITS[found[2]]
        return Machine(device_memory=memory, peak_flops=self.peak_flops, utilisation=self.utilisation)


class PlanCLI(BesideFitCLI):
    """`fit` up to the point where model and data would be made."""

    _options: PlanOptions

    def before_instantiate_classes(self) -> None:
        # Notes what the config says of machines, data and model, and replaces it so that none of them is made.
        config = self.config[self.config.subcommand]
        trainer, model = config["trainer"], config["model"]
        for name in ("num_nodes", "devices"):
            if (count := getattr(self._options, name)) is not None:
                trainer[name] = count
        super().before_instantiate_classes()
        self._world_size = _count("num_nodes", trainer["num_nodes"]) * _count("devices", trainer["devices"])
        self._layout = _read_layout(trainer["strategy"], num_nodes=trainer["num_nodes"], world_size=self._world_size)
        given = _SHORT.get(str(trainer["precision"]), str(trainer["precision"]))
        if given not in _PRECISIONS:
            raise ConfigError("trainer.precision", got=given, allowed=" | ".join(_PRECISIONS))
        self._dtype, self._autocast = _PRECISIONS[given]
        for name, value in _HERE.items():
            trainer[name] = value
        self._states = states_arguments(config)
        self._exit_blocks, model["exit_blocks"] = model["exit_blocks"], None  # they need the weights
        if self._exit_blocks is not None:
            refuse_without_weights(config, layout=self._layout)
        self._data = config.pop("data")["init_args"]
        if self._states is not None:
            corpus = self._states["corpus"]["init_args"]
            self._data = {"batch_size": self._states["batch_size"], "seq_len": corpus["seq_len"]}
        for name in ("batch_size", "seq_len"):
            if not isinstance(self._data.get(name), int):
                raise ConfigError(f"data.init_args.{name}", got=self._data.get(name), allowed="a number")
            check_range(f"data.init_args.{name}", self._data[name], low=1)
        self._from_scratch = model["pretrained"] is None
        if model["config"] is not None:
            model["pretrained"] = None  # the config describes the pretrained model, which need not be here yet
        elif model["pretrained"] is not None:
            model["config"], model["pretrained"] = _read_architecture(model["pretrained"]), None
        else:
            fix = "only config.json of that directory is read: --model.pretrained DIRECTORY"
            raise ConfigError("model.pretrained", got=None, allowed="a model's directory, or model.config", fix=fix)

    def _run_subcommand(self, subcommand: str) -> None:
        cache = None if self._states is None else plan_cache(self._states, self.model.config)
        try:
            plan = self._plan(self._recipe(), self._layout)
            is_short = plan.fits_with(checkpointing=plan.checkpointing) is False
            changes = changes_that_fit(plan, self._plan) if is_short else []
        except ConfigError as error:
            raise locate(error, self.plain_config()) from error
        if self._options.json:
            print(json.dumps(({} if cache is None else {"cache": cache._asdict()}) | _as_dict(plan, changes)))
            return
        if cache is not None:
            print_table(cache.table(plan, self._options.machine()))
        for table in plan_tables(plan, self._options.machine()):
            print_table(table)
        if is_short:
            print(f"\n{advice(changes)}")
        for departure in plan.departures:
            print(f"\nwarning: {departure.field}: {departure.message} ({departure.source})")

    def _recipe(self) -> Recipe:
        module, trainer = self.model, self.trainer
        module.trainer = trainer
        _check_dense(module.config)
        if module.peft is not None and self._layout.strategy == "fsdp2":
            raise refused_strategy("MeshStrategy")
        check_row_length(self._data["seq_len"], module.config, field="data.init_args.seq_len")
        for name in ("layer_dropout", "early_exit"):
            self.config_init[self.config.subcommand][name].setup(trainer, module, "fit")
        config = self.plain_config()
        dropout, exits = config["layer_dropout"], config["early_exit"]
        del dropout["rescale"]
        return Recipe(
            num_layers=module.num_layers,
            from_scratch=self._from_scratch,
            batch_size=self._data["batch_size"],
            seq_len=self._data["seq_len"],
            accumulate=trainer.accumulate_grad_batches,
            world_size=self._world_size,
            max_steps=trainer.max_steps if trainer.max_steps > 0 else None,
            **dropout,
            **exits | {"exit_layers": tuple(exits["exit_layers"])},
        )

    def _plan(self, recipe: Recipe, layout: Layout) -> Plan:
        given = (self.model.config, recipe, lambda stand_in: self.model.optimizer_over(stand_in)["optimizer"])
        settings: dict[str, Any] = {"layout": layout, "dtype": self._dtype, "autocast": self._autocast}
        settings["machine"] = self._options.machine()
        if self._exit_blocks is not None:
            learns = distillation_of(self._exit_blocks, self.model.config, states=self._states)
            return plan_exit_blocks(*given, learns=learns, **settings)
        checkpointing = self.model.activation_checkpointing
        return plan_training(*given, checkpointing=checkpointing, lora=self.model.peft, **settings)


def _read_architecture(path: str) -> PreTrainedConfig:
    """Read a model's config as `fit` does. Its weights need not be there yet."""
    try:
        return load_config(path, field="model.pretrained")
    except ConfigError as error:
        if Path(path).exists():
            raise
        fix = f"{error.fix}; if it is not here yet, {_ARCHITECTURE_FIRST}"
        raise ConfigError(error.field, got=error.got, allowed=error.allowed, fix=fix) from error


def _check_dense(config: PreTrainedConfig) -> None:
    """Refuse a mixture of experts, whose FLOPs depend on which experts the tokens choose."""
    for name, value in config.get_text_config().to_dict().items():
        if name.endswith("experts") and type(value) is int and value > 1:
            fix = "which experts a token takes depends on values, and plan counts without any"
            got = f"{config.model_type} with {name} {value}"
            raise ConfigError("model", got=got, allowed="a model without experts", fix=fix)


def _count(name: str, given: Any) -> int:
    if isinstance(given, list):
        return len(given)
    if str(given) in ("auto", "-1"):
        _log.warning(
            "trainer.%s: got %s, which only the machines know; planned for 1: --%s N sets it", name, given, name
        )
        return 1
    if not str(given).isdigit() or int(given) < 1:
        raise ConfigError(f"trainer.{name}", got=given, allowed="a number, 1 or more")
    return int(given)


def _read_layout(strategy: Any, *, num_nodes: int, world_size: int) -> Layout:
    """Tell where the parameters lie under `trainer.strategy`, which is a name or a class path with arguments."""
    name, arguments = name_of(strategy), settings_of(strategy)
    if (settings := mesh_settings(strategy)) is not None:
        _, shards, parts = mesh_of(settings, num_nodes=num_nodes, world_size=world_size)
        if parts != 1:
            path = "trainer.strategy.init_args.tensor_parallel_size"
            raise ConfigError(path, got=parts, allowed="1: plan does not count tensor parallelism")
        return Layout(strategy="fsdp2", shards=shards, gathers_cast=True)
    if world_size == 1 and (name == "auto" or name.startswith("single")):
        return Layout()
    if name == "auto" or name.startswith("ddp") or name == "DDPStrategy":
        return Layout(strategy="ddp", bucket_views=bool(arguments.get("gradient_as_bucket_view")))
    raise ConfigError("trainer.strategy", got=name, allowed="auto | ddp | MeshStrategy")


def _as_dict(plan: Plan, changes: list[Change]) -> dict[str, Any]:
    memory = asdict(plan.memory) | {"peak": plan.memory.peak, "peak_checkpointed": plan.memory.peak_checkpointed}
    recipe = asdict(plan.recipe) | {"tokens_per_step": plan.recipe.tokens_per_step, "tokens": plan.recipe.tokens}
    recipe["mean_exits"], recipe["mean_dropout_rates"] = plan.recipe.mean_exits, plan.recipe.mean_dropout_rates
    said: dict[str, Any] = {"departures": [departure._asdict() for departure in plan.departures]}
    said["changes_that_fit"] = [change._asdict() for change in changes]
    return asdict(plan) | said | {"memory": memory, "recipe": recipe, "flops": plan.flops, "hours": plan.hours}


run = partial(run_beside_fit, PlanCLI, "plan", PlanOptions)
