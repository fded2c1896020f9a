"""`layerskip plan`: what a config's run will take on given machines, before any of them is rented."""

from __future__ import annotations

import json
import logging
import re
import sys
from argparse import Namespace as Options
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn
from torch.optim import Optimizer
from transformers import AutoConfig

from app.cli.messages import locate
from app.cli.option_parser import OptionParser
from app.cli.plan_report import plan_tables
from app.cli.tables import print_table
from app.cli.train import LayerSkipCLI, make_cli
from app.errors import ConfigError, check_range
from app.evaluation.training_plan import Machine, Plan, plan_training
from app.evaluation.training_plan_memory import Layout
from app.evaluation.training_plan_recipe import Recipe
from app.model.checkpoint import load_config

_log = logging.getLogger(__name__)
# Type of the weights, and of the products where it is another.
_PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "64-true": (torch.float64, None),
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
}
_SHORT = {"64": "64-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "None": "32-true"}
_UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Nothing is trained, so it is planned wherever one is.
_HERE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}


class PlanCLI(LayerSkipCLI):
    """`fit` up to the point where model and data would be made."""

    def __init__(self, *args: Any, options: Options, **kwargs: Any) -> None:
        self._options = options
        self._machine = Machine(
            device_memory=None if options.device_memory is None else parse_bytes(options.device_memory),
            peak_flops=options.peak_flops,
            utilisation=options.utilisation,
        )
        super().__init__(*args, **kwargs)

    def before_instantiate_classes(self) -> None:
        """Note what the config says of machines, data and model, and make none of them."""
        config = self.config[self.config.subcommand]
        trainer, model = config["trainer"], config["model"]
        for name in ("num_nodes", "devices"):
            if (count := getattr(self._options, name)) is not None:
                trainer[name] = count
        super().before_instantiate_classes()
        self._world_size = _count("num_nodes", trainer["num_nodes"]) * _count("devices", trainer["devices"])
        self._layout = read_layout(trainer["strategy"], num_nodes=trainer["num_nodes"], world_size=self._world_size)
        given = _SHORT.get(str(trainer["precision"]), str(trainer["precision"]))
        if given not in _PRECISIONS:
            raise ConfigError("trainer.precision", got=given, allowed=" | ".join(_PRECISIONS))
        self._dtype, self._autocast = _PRECISIONS[given]
        for name, value in _HERE.items():
            trainer[name] = value
        self._data = config.pop("data")["init_args"]
        for name in ("batch_size", "seq_len"):
            if not isinstance(self._data.get(name), int):
                raise ConfigError(f"data.init_args.{name}", got=self._data.get(name), allowed="a number")
            check_range(f"data.init_args.{name}", self._data[name], low=1)
        self._from_scratch = model["pretrained"] is None
        if model["config"] is not None:
            model["pretrained"] = None  # with both, the one describes the other, which need not be here yet
        elif model["pretrained"] is not None:
            model["config"], model["pretrained"] = _read_architecture(model["pretrained"]), None
        else:
            fix = "of such a directory config.json alone is read here: --model.pretrained DIRECTORY"
            raise ConfigError("model.pretrained", got=None, allowed="a model's directory, or model.config", fix=fix)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            plan = self._plan()
        except ConfigError as error:
            raise locate(error, self._plain_config()) from error
        if self._options.json:
            print(json.dumps(_as_dict(plan)))
            return
        for table in plan_tables(plan, self._machine):
            print_table(table)
        for departure in plan.departures:
            print(f"\nwarning: {departure.field}: {departure.message} ({departure.source})")

    def _plan(self) -> Plan:
        module, trainer = self.model, self.trainer
        module.trainer = trainer
        longest = module.config.get_text_config().max_position_embeddings
        if self._data["seq_len"] > longest:
            allowed = f"1..{longest}, the model's max_position_embeddings"
            raise ConfigError("data.init_args.seq_len", got=self._data["seq_len"], allowed=allowed)
        dropout, exits = (self._get(self.config_init, name) for name in ("layer_dropout", "early_exit"))
        for curriculum in (dropout, exits):
            curriculum.setup(trainer, module, "fit")
        recipe = Recipe(
            num_layers=module.num_layers,
            from_scratch=self._from_scratch,
            batch_size=self._data["batch_size"],
            seq_len=self._data["seq_len"],
            accumulate=trainer.accumulate_grad_batches,
            world_size=self._world_size,
            max_steps=trainer.max_steps if trainer.max_steps > 0 else None,
            max_dropout_rate=dropout.max_dropout_rate,
            depth_scale=dropout.depth_scale,
            time_scale=dropout.time_scale,
            curriculum=exits.curriculum,
            rotation_interval=exits.rotation_interval,
            early_exit_scale=exits.early_exit_scale,
            exit_weights=exits.exit_weights,
            always_on_last=exits.always_on_last,
            exit_layers=exits.exit_layers,
        )

        def configure(stand_in: nn.Module) -> Optimizer:
            module.model = stand_in
            optimizer: Optimizer = module.configure_optimizers()["optimizer"]
            return optimizer

        return plan_training(
            module.config,
            recipe,
            configure,
            layout=self._layout,
            dtype=self._dtype,
            autocast=self._autocast,
            checkpointing=module.activation_checkpointing,
            machine=self._machine,
        )


def _read_architecture(path: str) -> Any:
    """From config.json alone, where there is one: weights need not be there yet."""
    try:
        if not (Path(path) / "config.json").is_file():
            return load_config(path, field="model.pretrained")
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:  # a ConfigError is a ValueError
        allowed = "a model's directory with its config.json, a hub id, or a file that fit takes"
        fix = "if it is not here yet, give model.config as well (configs/model), which then says what it is"
        raise ConfigError("model.pretrained", got=path, allowed=allowed, fix=fix) from error


def _count(name: str, given: Any) -> int:
    """Of nodes or devices."""
    if isinstance(given, list):
        return len(given)
    if str(given) in ("auto", "-1"):
        _log.warning(
            "trainer.%s: got %s, which is known on the machines alone; planned for 1: --%s N", name, given, name
        )
        return 1
    if not str(given).isdigit() or int(given) < 1:
        raise ConfigError(f"trainer.{name}", got=given, allowed="a number, 1 or more")
    return int(given)


def read_layout(strategy: Any, *, num_nodes: int, world_size: int) -> Layout:
    """Where parameters lie under trainer.strategy, as it is parsed: a name, or a class path with arguments.

    Raises:
        ConfigError: A strategy that the module does not train with, or whose mesh is not of this size.
    """
    arguments: dict[str, Any] = dict(strategy.get("init_args") or {}) if isinstance(strategy, Namespace) else {}
    name = str(strategy["class_path"] if isinstance(strategy, Namespace) else strategy).rpartition(".")[2].lower()
    if name == "modelparallelstrategy":
        mesh = {"data_parallel_size": num_nodes, "tensor_parallel_size": world_size // num_nodes}  # Lightning's auto
        mesh |= {key: int(arguments[key]) for key in mesh if arguments.get(key, "auto") != "auto"}
        for key, allowed in (("tensor_parallel_size", 1), ("data_parallel_size", world_size)):
            if mesh[key] != allowed:
                path = f"trainer.strategy.init_args.{key}"
                raise ConfigError(path, got=mesh[key], allowed=f"{allowed} for {world_size} devices")
        return Layout(strategy="fsdp2", shards=world_size)
    if world_size == 1 and (name == "auto" or name.startswith("single")):
        return Layout()
    if name == "auto" or name.startswith("ddp"):
        return Layout(strategy="ddp", bucket_views=bool(arguments.get("gradient_as_bucket_view")))
    raise ConfigError("trainer.strategy", got=name, allowed="auto | ddp | ModelParallelStrategy")


def parse_bytes(text: str) -> float:
    """`80GB` (10^9) or `80GiB` (2^30) as bytes.

    Raises:
        ConfigError: It is neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", text.upper())
    if not found or not float(found[1]):
        raise ConfigError("device_memory", got=text, allowed="a size, such as 80GB or 80GiB")
    return float(found[1]) * _UNITS[found[2] or ""]


def _as_dict(plan: Plan) -> dict[str, Any]:
    memory = asdict(plan.memory) | {"peak": plan.memory.peak, "peak_checkpointed": plan.memory.peak_checkpointed}
    recipe = asdict(plan.recipe) | {"tokens_per_step": plan.recipe.tokens_per_step, "tokens": plan.recipe.tokens}
    recipe["mean_exits"], recipe["mean_dropout_rates"] = plan.recipe.mean_exits, plan.recipe.mean_dropout_rates
    said = {"departures": [departure._asdict() for departure in plan.departures]}
    return asdict(plan) | said | {"memory": memory, "recipe": recipe, "flops": plan.flops, "hours": plan.hours}


def run() -> None:
    """Parse and run the verb."""
    own = OptionParser(
        allow_abbrev=False,
        prog="layerskip plan",
        description="Say what a config's run will take: memory, tokens, FLOPs, hours; needs no weights, data or GPU.",
        epilog="All options of `layerskip fit` are taken too: --config FILE, --trainer.max_steps N, ...",
    )
    own.add_argument("--num_nodes", type=int, help="machines, instead of trainer.num_nodes")
    own.add_argument("--devices", type=int, help="devices of each, instead of trainer.devices")
    own.add_argument("--device_memory", help="of one device, such as 80GB (10^9) or 80GiB (2^30)")
    own.add_argument("--peak_flops", type=float, help="of one device, a second, in the run's precision, such as 989e12")
    own.add_argument("--utilisation", type=float, default=0.4, help="share of those that a run reaches")
    own.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options, rest = own.parse_known_args(sys.argv[2:])
    check_range("num_nodes", options.num_nodes or 1, low=1)
    check_range("devices", 1 if options.devices is None else options.devices, low=1)
    if options.peak_flops is not None and not 0 < options.peak_flops < float("inf"):
        raise ConfigError("peak_flops", got=options.peak_flops, allowed="(0, inf)")
    if not 0 < options.utilisation <= 1:
        raise ConfigError("utilisation", got=options.utilisation, allowed="(0, 1]")
    sys.argv[1:] = ["fit", *rest]
    make_cli(partial(PlanCLI, options=options))
