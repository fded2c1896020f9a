"""`layerskip plan`: what a config's run will take on given machines, before any of them is rented."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from app.cli.messages import locate
from app.cli.plan_options import PROG, PlanOptions, parse_options
from app.cli.strategies import mesh_of, mesh_settings, name_of, settings_of
from app.cli.tables import print_table
from app.cli.train import LayerSkipCLI, make_cli
from app.errors import ConfigError, check_range
from app.model_files.open import load_config
from app.planning.changes import Change, changes_that_fit, fits
from app.planning.memory import Layout
from app.planning.plan import Plan, plan_training
from app.planning.recipe import Recipe
from app.planning.report import advice, plan_tables
from app.training.batch import check_row_length

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
_ARCHITECTURE_FIRST = (
    "give its architecture before the file that continues it: --config configs/model/NAME.yaml --config ...;"
    " in that order it is planned as a model that is continued (fit takes one or the other)"
)
# Nothing is trained, so it is planned wherever one is.
_HERE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}


class PlanCLI(LayerSkipCLI):
    """`fit` up to the point where model and data would be made."""

    def __init__(self, *args: Any, options: PlanOptions, **kwargs: Any) -> None:
        self._options = options
        super().__init__(*args, **kwargs)

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """As `fit`'s, but that what is wrong with an option is said by this verb's name."""
        super().setup_parser(*args, **kwargs)
        self._subcommand_parsers["fit"].prog = PROG

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
            plan = self._plan(self._recipe(), self._layout)
            is_short = fits(plan, checkpointing=plan.checkpointing) is False
            changes = changes_that_fit(plan, self._plan) if is_short else []
        except ConfigError as error:
            raise locate(error, self._plain_config()) from error
        if self._options.json:
            print(json.dumps(_as_dict(plan, changes)))
            return
        for table in plan_tables(plan, self._options.machine):
            print_table(table)
        if is_short:
            print(f"\n{advice(changes)}")
        for departure in plan.departures:
            print(f"\nwarning: {departure.field}: {departure.message} ({departure.source})")

    def _recipe(self) -> Recipe:
        module, trainer = self.model, self.trainer
        module.trainer = trainer
        _check_dense(module.config)
        check_row_length(self._data["seq_len"], module.config, field="data.init_args.seq_len")
        dropout, exits = (self.config_init[self.config.subcommand][name] for name in ("layer_dropout", "early_exit"))
        for curriculum in (dropout, exits):
            curriculum.setup(trainer, module, "fit")
        return Recipe(
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

    def _plan(self, recipe: Recipe, layout: Layout) -> Plan:
        module = self.model

        def configure(stand_in: nn.Module) -> Optimizer:
            optimizer: Optimizer = module.optimizer_over(stand_in)["optimizer"]
            return optimizer

        return plan_training(
            module.config,
            recipe,
            configure,
            layout=layout,
            dtype=self._dtype,
            autocast=self._autocast,
            checkpointing=module.activation_checkpointing,
            machine=self._options.machine,
        )


def _read_architecture(path: str) -> PreTrainedConfig:
    """As `fit` reads and refuses it: weights need not be there yet."""
    try:
        return load_config(path, field="model.pretrained")
    except ConfigError as error:
        if Path(path).exists():
            raise
        fix = f"{error.fix}; if it is not here yet, {_ARCHITECTURE_FIRST}"
        raise ConfigError(error.field, got=error.got, allowed=error.allowed, fix=fix) from error


def _check_dense(config: PreTrainedConfig) -> None:
    """Refuse a mixture of experts, whose FLOPs torch does not count either."""
    for name, value in config.get_text_config().to_dict().items():
        if name.endswith("experts") and type(value) is int and value > 1:
            fix = "which experts a token takes depends on values, and plan counts without any"
            got = f"{config.model_type} with {name} {value}"
            raise ConfigError("model", got=got, allowed="a model without experts", fix=fix)


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


def run() -> None:
    """Parse and run the verb."""
    options, rest = parse_options(sys.argv[2:])
    sys.argv[1:] = ["fit", *rest]
    make_cli(partial(PlanCLI, options=options))
