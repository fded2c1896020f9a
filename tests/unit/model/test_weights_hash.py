"""The hash that ties an exit block and cached states to the model they were made with."""

import pytest
import torch

from app.errors import ConfigError
from app.model.weights_hash import weights_hash
from tests.unit.spans.test_architectures import make_model


@pytest.mark.parametrize("tied", [False, True])
def test_the_hash_covers_what_an_exit_depends_on_and_nothing_else(tied: bool) -> None:
    state = make_model("llama", tie_word_embeddings=tied).state_dict()
    before = weights_hash(state, exit_layer=2)
    seen = {before}
    for name, tensor in state.items():
        if tied and name == "lm_head.weight":
            continue
        for changed in (tensor + 1, tensor.clone().index_fill_(0, torch.tensor(-1), 7.0)):
            after = weights_hash({**state, name: changed}, exit_layer=2)
            assert (after == before) == (".layers.2." in name), name
            assert after not in seen or after == before, name
            seen.add(after)
    assert len(before) == 64
    assert weights_hash(state, exit_layer=1) != before
    renamed = {name.replace("q_proj", "p_proj"): tensor for name, tensor in state.items()}
    assert weights_hash(renamed, exit_layer=2) != before
    reshaped = state | {"model.norm.weight": state["model.norm.weight"][None]}
    assert weights_hash(reshaped, exit_layer=2) != before


def test_the_order_the_type_in_a_file_and_a_left_out_tied_head_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_model("llama", tie_word_embeddings=True).state_dict()
    expected = weights_hash(state, exit_layer=1)
    stored = {name: state[name].bfloat16() for name in reversed(state) if name != "lm_head.weight"}
    monkeypatch.setattr("app.model.weights_hash._CHUNK", 5)
    assert weights_hash(stored, exit_layer=1) == expected
    transposed = {name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in stored.items()}
    assert weights_hash(transposed, exit_layer=1) == expected
    untied = {**state, "lm_head.weight": state["lm_head.weight"] + 1}
    assert weights_hash(untied, exit_layer=1) != expected


@pytest.mark.parametrize("exit_layer", [0, 4])
def test_an_exit_beyond_the_blocks_given_is_refused(exit_layer: int) -> None:
    with pytest.raises(ConfigError, match="exit_layer: got"):
        weights_hash(make_model("llama").state_dict(), exit_layer=exit_layer)
