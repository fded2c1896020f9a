"""Ranks fill their shards and nothing more: the weights of one process, in the memory of a part."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoConfig

from app.errors import CheckpointError
from app.model.config_check import build_without_memory
from app.model.early_exit import EarlyExitModel
from app.model.parallel import DATA_PARALLEL, REPLICATE, TENSOR_PARALLEL, parallelize
from app.model_files.open import build_model, load_config, load_pretrained
from app.model_files.sharded_loading import fill
from tests.support.checkpoints import write_checkpoint
from tests.support.distributed import is_sharded, whole_weights
from tests.support.memory import Peak
from tests.support.processes import run_ranks
from tests.support.tiny_models import tiny_config
from tests.support.tokenizers import byte_level

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
    "vocab_size": 301,  # no rank has as many rows as the next one
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def config_of(model_type, **settings):
    return AutoConfig.for_model(model_type, **(SMALL | settings))


# -- at random, on one device: what is drawn, in which order ---------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3", "arcee"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_drawn_tensor_by_tensor_are_those_of_the_whole_model(model_type, tied):
    config = config_of(model_type, tie_word_embeddings=tied)
    whole, state = build_model(config, seed=3), torch.get_rng_state()
    ours = build_without_memory(config, dtype=torch.float32)
    fill(ours, torch.device("cpu"), pretrained=None, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    for (name, expected), (other, found) in zip(whole.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(found, expected), name
    for (name, expected), (_, found) in zip(whole.named_buffers(), ours.named_buffers(), strict=True):
        assert torch.equal(found, expected), name
    fill(ours, torch.device("cpu"), pretrained=None, seed=4)
    assert not torch.equal(ours.lm_head.weight, whole.lm_head.weight)


# -- on ranks --------------------------------------------------------------------------------------------------------


class Root(nn.Module):
    """Holds a model as LayerSkipModule does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self):
        """What FSDP2 makes a forward of."""

    validation_step = test_step = predict_step = training_step


def sharded(sizes, *, config, pretrained=None, seed=0, dtype=torch.float32):
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=(REPLICATE, DATA_PARALLEL, TENSOR_PARALLEL))
    root = Root(build_without_memory(config, dtype=dtype))
    EarlyExitModel(root.model)
    parallelize(root, root.model, mesh)
    fill(root.model, torch.device("cpu"), pretrained=pretrained, seed=seed)
    return root.model


def filled(sizes, settings):
    model = sharded(sizes, **settings)
    assert all(map(is_sharded, model.parameters()))
    assert model.lm_head.weight is model.model.embed_tokens.weight or not model.config.tie_word_embeddings
    return whole_weights(model), model.model.rotary_emb.inv_freq.numpy()


def assert_same(found, expected):
    weights, frequencies = found
    assert (frequencies == expected.model.rotary_emb.inv_freq.numpy()).all()
    for name, value in expected.named_parameters():
        assert (weights[name] == value.detach().float().numpy()).all(), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("sizes", "model_type", "tied"),
    [((2, 2, 1), "llama", True), ((1, 2, 2), "qwen3", False), ((1, 1, 2), "qwen2", True)],
)
def test_ranks_draw_the_weights_of_one_process(sizes, model_type, tied):
    config = config_of(model_type, tie_word_embeddings=tied)
    expected = build_model(config, seed=5)
    ranks = sizes[0] * sizes[1] * sizes[2]
    for found in run_ranks(filled, sizes, {"config": config, "seed": 5}, world_size=ranks):
        assert_same(found, expected)


def save_shards(folder, model):
    mesh = init_device_mesh("cpu", (2,))
    weights = {f"model.{name}": distribute_tensor(t, mesh, [Shard(0)]) for name, t in model.state_dict().items()}
    dcp.save({"state_dict": weights}, checkpoint_id=folder)


FORMS = ("directory", "run.ckpt", "shards")


def save(root, model):
    """In every form; safetensors in several files and bfloat16."""
    model.bfloat16().save_pretrained(root / "directory", max_shard_size="40MB" if size(model) > 1e8 else "20KB")
    model.float()
    write_checkpoint(root / "run.ckpt", model, byte_level())
    run_ranks(save_shards, root / "shards", model)
    content = torch.load(root / "run.ckpt", weights_only=True, mmap=True)
    del content["state_dict"]
    torch.save(content, root / "shards" / "meta.pt")
    return root


def size(model):
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save(tmp_path_factory.mktemp("small"), build_model(config_of("llama", tie_word_embeddings=False), seed=1))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("form", "sizes"), [("directory", (1, 2, 2)), ("run.ckpt", (1, 2, 1)), ("shards", (2, 1, 1)), ("shards", (1, 1, 2))]
)
def test_ranks_load_the_weights_of_one_process(small, form, sizes):
    path = str(small / form)
    settings = {"config": load_config(path), "pretrained": path}
    ranks = sizes[0] * sizes[1] * sizes[2]
    for found in run_ranks(filled, sizes, settings, world_size=ranks):
        assert_same(found, load_pretrained(path))


def missing(path):
    try:
        sharded((1, 2, 1), config=config_of("llama", num_hidden_layers=3), pretrained=path)
    except CheckpointError as error:
        return str(error)


@pytest.mark.distributed
def test_shards_that_are_not_there_are_named(small):
    for message in run_ranks(missing, str(small / "shards")):
        assert "weights of the model are missing, the first is model.layers.2.input_layernorm.weight" in message


# -- memory ----------------------------------------------------------------------------------------------------------


ROWS, WIDTH = 6_000, 768


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    config = tiny_config(vocab_size=ROWS, hidden_size=WIDTH, num_layers=10, tied=False, num_attention_heads=12)
    return save(tmp_path_factory.mktemp("large"), build_model(config, seed=0))


def growth(settings, tiny):
    sharded((1, 2, 1), config=load_config(tiny), pretrained=tiny)  # a fork maps its libraries as it comes to them
    with Peak() as peak:
        model = sharded((1, 2, 1), **settings)
    return peak.grown, sum(parameter.to_local().nbytes for parameter in model.parameters())


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells what a process took at most")
@pytest.mark.parametrize("form", [*FORMS, None])
def test_a_rank_takes_the_memory_of_its_shards_and_one_tensor(small, large, form):
    path = None if form is None else str(large / form)
    settings = {"config": load_config(str(large / "directory")), "pretrained": path}
    for grown, shards in run_ranks(growth, settings, str(small / "directory")):
        # Drawing makes whole tensors, one after the other, and leaves gaps behind.
        limit = 1.1 * shards + (2 if form else 4) * (4 * ROWS * WIDTH)
        assert 0.9 * shards < grown < limit < 1.9 * shards  # a whole model would be seen
