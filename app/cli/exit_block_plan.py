"""What exit blocks are planned from, and the cache that they learn from. Tested by tests/contract/test_plan.py."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from transformers import PreTrainedConfig

from app.errors import ConfigError, check_early_exits, check_range
from app.model.lora import check_goes_with_lora
from app.model_files.draft_vocabulary import read_draft_vocabulary
from app.planning.exit_blocks import Distillation
from app.planning.memory import Layout
from app.planning.plan import Machine, Plan
from app.planning.report import shown_bytes, shown_seconds
from app.tables import Table
from app.text.text_tokens import listed_ends
from app.training.exit_block_settings import ExitBlockSettings, refuse_with_exit_blocks
from datamodules.cached_states import some_exits
from datamodules.state_cache.shards import RowLayout


class CachePlan(NamedTuple):
    """What a cache of states takes on the disk, at most: fewer rows may be held out than are asked for."""

    tokens: int
    num_states: int  # of each token
    width: int
    dtype: str
    bytes: int

    def table(self, plan: Plan, machine: Machine) -> Table:
        """Make the table of the disk, and of the pass of the model if `plan` is of exit blocks."""
        states = f"{self.num_states} x {self.width:,} in {self.dtype}"
        rows: list[tuple[str, ...]] = [
            ("tokens", f"{self.tokens:,}"),
            ("states a token", states),
            ("all", shown_bytes(self.bytes)),
        ]
        if plan.exit_blocks is not None:
            flops = self.tokens * plan.exit_blocks.pass_flops_per_token
            rows.append(("FLOPs to fill it, once", f"{flops:.3e}"))
            if seconds := machine.seconds(flops):
                rows.append(("time on one device", shown_seconds(seconds)))
        return Table("Cache of states, at most", ("what", "figure"), rows)


def plan_cache(states: Any, config: PreTrainedConfig) -> CachePlan:
    """The cache that a CachedStatesDataModule's arguments ask for; ConfigError if one is out of this model's range."""
    corpus, text = states["corpus"]["init_args"], config.get_text_config()
    exits = some_exits(states["exit_layers"], field="data.exit_layers")
    check_early_exits(exits, num_layers=text.num_hidden_layers, instead="", field="data.exit_layers")
    check_range("data.num_tokens", states["num_tokens"], low=1)
    for name in ("batch_size", "validation_rows"):
        check_range(f"data.corpus.{name}", corpus[name], low=1)
    layout = RowLayout(
        seq_len=corpus["seq_len"],
        num_states=len({*exits}) + 1,
        width=text.hidden_size,
        dtype=getattr(torch, states["dtype"]),
        batch_size=corpus["batch_size"],
    )
    held_out = corpus["validation_rows"] * len(corpus["sources"])
    num_rows = math.ceil(states["num_tokens"] / layout.seq_len) + held_out
    return CachePlan(
        tokens=num_rows * layout.seq_len,
        num_states=layout.num_states,
        width=layout.width,
        dtype=states["dtype"],
        bytes=num_rows * layout.row_bytes,
    )


def refuse_without_weights(config: Namespace, *, layout: Layout) -> None:
    """Refuse settings that `fit` refuses with exit blocks once it has the model, which plan never has."""
    model = config["model"]
    refuse_with_exit_blocks(None, model["activation_checkpointing"], model["compile_blocks"])
    if model["peft"] is not None:
        check_goes_with_lora(exit_blocks=True, compile_blocks=False)
    recipe: dict[str, tuple[object, object]] = {
        "layer_dropout.max_dropout_rate": (config["layer_dropout"]["max_dropout_rate"], 0.0),
        "early_exit.curriculum": (config["early_exit"]["curriculum"], "none"),
    }
    for field, (got, allowed) in recipe.items():
        if got != allowed:
            fix = "the model of exit blocks is frozen"
            raise ConfigError(field, got=got, allowed=f"{allowed} with model.exit_blocks", fix=fix)
    if layout.strategy == "fsdp2":
        raise ConfigError("trainer.strategy", got="MeshStrategy", allowed="one device or ddp with model.exit_blocks")


def distillation_of(exit_blocks: Mapping[str, Any], config: PreTrainedConfig, *, states: Any) -> Distillation:
    """Return what is planned for `model.exit_blocks`, the fields of ExitBlockSettings.

    `states` are the arguments of the CachedStatesDataModule, None if the frozen model gives the states. ConfigError or
    DataError if an exit is none of the model's, or the draft vocabulary cannot be read.
    """
    settings, text = ExitBlockSettings(**exit_blocks), config.get_text_config()
    num_ids = None
    if settings.vocabulary is not None:
        ends = listed_ends(text.eos_token_id)
        num_ids = len(read_draft_vocabulary(Path(settings.vocabulary), vocab_size=text.vocab_size, ends=ends))
    return Distillation(
        sources=settings.sources(text.num_hidden_layers),
        affine=settings.affine,
        loss=settings.loss,
        num_ids=num_ids,
        cached=None if states is None else getattr(torch, states["dtype"]),
    )
