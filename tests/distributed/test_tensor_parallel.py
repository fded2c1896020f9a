"""Blocks split over two ranks: the same forward and gradients, free decoding in between, and what cannot be split."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from app.decoding.settings import DecodingSettings
from app.errors import ConfigError
from app.model.compiled_blocks import compile_blocks
from app.model.early_exit import EarlyExitModel
from app.model.parallel import DATA_PARALLEL, TENSOR_PARALLEL, parallelize, unsharded
from app.model.tensor_parallel import split
from app.model_files.open import build_model
from app.spans.decoder import SpanDecoder
from tests.distributed.test_sharded_loading import config_of
from tests.support.decoding import decode
from tests.support.distributed import Collectives, is_sharded
from tests.support.processes import run_ranks

TOKENS = torch.arange(24).view(2, 12) * 7 % 61
POSITIONS = torch.arange(12).expand(2, -1)


class Root(nn.Module):
    """Holds a model as LayerSkipModule does, and has a step of its own."""

    def __init__(self, config):
        super().__init__()
        self.model = build_model(config, seed=0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)  # so that tokens vary
                parameter.add_(0.01 * torch.arange(parameter.numel()).view(parameter.shape).sin())  # and biases matter
        self.network = EarlyExitModel(self.model)

    def training_step(self, kept):
        scales = [1.0] * len(kept)
        hidden = self.network.hidden_by_exit(TOKENS, POSITIONS, (1, 2), kept=kept, scales=scales)
        return sum(self.network.head(normed).logsumexp(-1).sum() for normed in hidden.values())

    validation_step = test_step = predict_step = training_step


def step(root):
    root.train()
    loss = root.training_step([torch.tensor([1]), torch.arange(2)])
    loss.backward()
    gradients = {
        name: (parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad).clone().numpy()
        for name, parameter in root.model.named_parameters()
    }
    root.zero_grad()
    return loss.item(), gradients


def decoded(root, num_tokens):
    settings = DecodingSettings(max_new_tokens=num_tokens, exit_layer=1, num_draft_tokens=3)
    return decode(SpanDecoder(root.model.eval()), [3, 1, 4], strategy="self_speculative", settings=settings).tokens


def on_rank(config):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=(DATA_PARALLEL, TENSOR_PARALLEL))
    root = Root(config)
    parallelize(root, root.model, mesh)
    before = step(root)
    with Collectives() as inside, unsharded(root):
        entered = inside.count
        tokens = decoded(root, (5, 17)[mesh.get_local_rank(TENSOR_PARALLEL)])
        plain, during = not any(map(is_sharded, root.model.parameters())), inside.count - entered
    after = step(root)
    frozen = sum(not parameter.requires_grad for parameter in root.model.parameters())
    return {"before": before, "after": after, "tokens": tokens, "plain": plain, "inside": during, "frozen": frozen}


ARCHITECTURES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "arcee": {"tie_word_embeddings": False},
}


@pytest.mark.distributed
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_two_ranks_have_the_losses_gradients_and_tokens_of_one(model_type):
    config = config_of(model_type, **ARCHITECTURES[model_type])
    single = Root(config)
    loss, gradients = step(single)
    expected = decoded(single, 17)
    assert len(set(expected)) > 1
    for rank, found in enumerate(run_ranks(on_rank, config)):
        for ours in (found["before"], found["after"]):
            assert ours[0] == pytest.approx(loss, rel=1e-6)
            for name, gradient in gradients.items():
                scale = max(1.0, abs(gradient).max())
                assert abs(ours[1][name] - gradient).max() < 1e-5 * scale, name
        assert found["tokens"] == expected[: (5, 17)[rank]]
        assert found["plain"]
        assert found["inside"] == found["frozen"] == 0


def refused(config, size, compiled):
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=(TENSOR_PARALLEL,))
    model = build_model(config, seed=0)
    EarlyExitModel(model)
    try:
        split(model, mesh)
        if compiled:
            compile_blocks(model)
    except ConfigError as error:
        return str(error)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (config_of("phi3"), 2, "allowed 1 for phi3; its self_attn.qkv_proj (Linear) is not split"),
        (
            config_of("olmo2"),
            2,
            "tensor_parallel_size: got 2, allowed 1 for olmo2; its self_attn.q_norm (Olmo2RMSNorm)",
        ),
        (
            config_of("llama", num_attention_heads=4, num_key_value_heads=1),
            2,
            "got 2, allowed a divisor of the model's num_attention_heads 4, num_key_value_heads 1, inter",
        ),
    ],
    ids=["phi3", "olmo2", "odd heads"],
)
def test_what_cannot_be_split_is_refused_by_name(config, size, message):
    for found in run_ranks(refused, config, size, False):
        assert message in found


@pytest.mark.distributed
def test_split_blocks_are_not_compiled():
    for found in run_ranks(refused, config_of("llama"), 2, True):
        assert found == "compile_blocks: got True, allowed false with tensor_parallel_size > 1"
