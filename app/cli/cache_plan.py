"""What a cache of states will take on the disk. Tested by tests/contract/test_plan.py."""

import math
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from app.errors import check_range
from app.planning.report import shown_bytes
from app.tables import Table
from datamodules.cached_states import check_exits
from datamodules.state_cache.shards import RowLayout


class CachePlan(NamedTuple):
    """What a cache of states takes on the disk, at most: fewer rows may be held out than are asked for."""

    tokens: int
    num_states: int  # of each token
    width: int
    dtype: str
    bytes: int

    def table(self) -> Table:
        states = f"{self.num_states} x {self.width:,} in {self.dtype}"
        rows: list[tuple[str, ...]] = [
            ("tokens", f"{self.tokens:,}"),
            ("states a token", states),
            ("all", shown_bytes(self.bytes)),
        ]
        return Table("Cache of states, at most", ("what", "figure"), rows)


def plan_cache(states: Any, config: PreTrainedConfig) -> CachePlan:
    """Return the cache that the arguments of a CachedStatesDataModule ask for, of a model of this config.

    Raises:
        ConfigError: An exit is none of the model's, or a number is out of its range.
    """
    corpus, exits, text = states["corpus"]["init_args"], states["exit_layers"], config.get_text_config()
    check_exits(exits, num_layers=text.num_hidden_layers, field="data.exit_layers")
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
