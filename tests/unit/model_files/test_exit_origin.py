"""The file that tells whose first blocks a draft model is."""

import json
from pathlib import Path

import pytest
import torch

from app.errors import CheckpointError, ConfigError
from app.model_files.exit_origin import EXIT_ORIGIN_FILE, check_exit_origin, exit_origin_file
from tests.support.tiny_models import tiny_llama

_MODEL = tiny_llama()  # of 4 blocks


@pytest.mark.parametrize(
    ("exit_layer", "change", "fits"),
    [
        (1, {}, True),
        (4, {}, True),
        (0, {}, False),
        (5, {}, False),
        (2, {"dtype": torch.bfloat16}, True),  # the hash is that of weights in bfloat16
        (2, {"seed": 1}, False),
        (2, {"seed": 1, "dtype": torch.float16}, True),  # nothing is compared
    ],
)
def test_a_model_has_the_first_blocks_that_the_file_tells_of(
    exit_layer: int, change: dict[str, object], fits: bool, tmp_path: Path
) -> None:
    target = tiny_llama(seed=int(change.get("seed", 0))).to(change.get("dtype", torch.float32))  # type: ignore[call-overload]
    told = json.loads(exit_origin_file(_MODEL.state_dict(), exit_layer=min(max(1, exit_layer), 4)))
    (tmp_path / EXIT_ORIGIN_FILE).write_text(json.dumps(told | {"exit_layer": exit_layer}))
    if fits:
        check_exit_origin(str(tmp_path), target, field="draft_model")
    else:
        with pytest.raises(ConfigError, match=r"draft_model: got .*, allowed an exit of the model"):
            check_exit_origin(str(tmp_path), target, field="draft_model")


@pytest.mark.parametrize("content", ["{", "[]", '{"exit_layer": 1}', '{"exit_layer": "x", "weights_hash": ""}'])
def test_a_damaged_file_is_refused_and_a_folder_without_it_is_any_model(content: str, tmp_path: Path) -> None:
    check_exit_origin(str(tmp_path), _MODEL, field="draft_model")
    (tmp_path / EXIT_ORIGIN_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"damaged .*; export the exit again"):
        check_exit_origin(str(tmp_path), _MODEL, field="draft_model")
