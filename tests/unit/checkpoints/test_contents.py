"""What is no checkpoint of a run is refused by name; optimizer states keep their parameters in both forms."""

import pytest
import torch

from app.checkpoints.contents import from_shards, read_file, refuse_weights_alone, to_shards
from app.errors import CheckpointError

CONTENT = {
    "pytorch-lightning_version": "2.6.0",
    "global_step": 1,
    "state_dict": {"model.w": torch.ones(2)},
    "optimizer_states": [{"state": {}, "param_groups": []}],
    "lr_schedulers": [{}],
    "loops": {"fit_loop": {}},
    "callbacks": {},
    "hf_config": {},
}


def without(key):
    return {name: value for name, value in CONTENT.items() if name != key}


FOREIGN = [
    ([CONTENT], "not a Lightning checkpoint"),
    (
        CONTENT | {"pytorch-lightning_version": "x"},
        "damaged or foreign, pytorch-lightning_version: got 'x', allowed 2.x",
    ),
    *((without(key), f"not a Lightning checkpoint .no '{key}' in it.") for key in [*CONTENT][:3]),
    *((CONTENT | {key: 5}, f"damaged or foreign, its '{key}' is no ") for key in [*CONTENT][2:]),
]


@pytest.mark.parametrize(("content", "message"), FOREIGN)
def test_a_file_that_lightning_cannot_read_is_refused_by_name(tmp_path, content, message):
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match=rf"foreign\.ckpt: {message}") as caught:
        read_file(tmp_path / "foreign.ckpt")
    assert "\n" not in str(caught.value)


def test_weights_without_a_run_are_told_from_one(tmp_path):
    torch.save(CONTENT, tmp_path / "last.ckpt")
    refuse_weights_alone("last.ckpt", read_file(tmp_path / "last.ckpt"))
    for content, missing in (
        (without("loops"), "loops"),
        (CONTENT | {"loops": {}}, "loops"),
        (CONTENT | {"optimizer_states": []}, "optimizer_states"),
        (without("lr_schedulers"), "lr_schedulers"),
    ):
        with pytest.raises(CheckpointError, match=rf"no run to go on with \(no {missing} in it\)"):
            refuse_weights_alone("last.ckpt", content)


def test_a_state_comes_back_from_names_and_from_shards():
    state = {
        "state": {0: {"step": torch.ones(()), "exp_avg": torch.zeros(2), "plain": 3}, 1: {"step": torch.ones(())}},
        "param_groups": [{"params": [0], "lr": 0.1}, {"params": [1], "lr": 0.2}],
    }
    plain, tensors = to_shards(state, ["a.weight", "b.bias"], 0)
    assert [group["params"] for group in plain["param_groups"]] == [["a.weight"], ["b.bias"]]
    assert plain["state"] == {"a.weight": {"plain": 3}, "b.bias": {}}
    keys = ["a.weight.step", "a.weight.exp_avg", "b.bias.step"]
    assert [*tensors] == [f"optimizer_0.state.{key}" for key in keys]
    again = from_shards(plain, tensors, 0)
    assert again["param_groups"] == state["param_groups"]
    assert {index: dict(sorted(entries.items())) for index, entries in again["state"].items()} == {
        index: dict(sorted(entries.items())) for index, entries in state["state"].items()
    }
