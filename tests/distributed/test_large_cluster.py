"""The paper's 7B run on 64 devices: built and sharded as there, without memory and without a network."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

from app.model.config_check import build_without_memory
from app.model.early_exit import EarlyExitModel
from app.model.parallel import parallelize
from tests.support.distributed import is_sharded
from tests.support.processes import run_ranks
from tests.support.runs import cli

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = [CONFIGS / "experiment" / "llama2_7b_continual.yaml", CONFIGS / "model" / "llama2_7b.yaml"]
DEVICES = 64
NAMES = ("replicate", "data_parallel", "tensor_parallel")


class Root(torch.nn.Module):
    """Has the methods of a training module, and never runs them."""

    def training_step(self):
        raise NotImplementedError

    validation_step = test_step = predict_step = training_step


def local_bytes(architecture, rank, mesh_shape):
    """Of all parameters, and of what this rank holds of them."""
    dist.init_process_group("fake", rank=rank, world_size=DEVICES, store=FakeStore())
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=NAMES)
    root = Root()
    root.model = build_without_memory(LlamaConfig(**architecture), dtype=torch.float32)
    EarlyExitModel(root.model)
    parallelize(root, root.model, mesh, compute_dtype=torch.bfloat16)
    parameters = list(root.parameters())
    assert all(map(is_sharded, parameters))
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    return sum(parameter.nbytes for parameter in parameters), sum(p.to_local().nbytes for p in parameters)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mesh_shape", "strategy"), [pytest.param((1, 64, 1), "fsdp2", marks=pytest.mark.slow), ((8, 8, 1), "hsdp")]
)
def test_each_of_64_devices_holds_of_the_7b_what_the_plan_says(mesh_shape, strategy, monkeypatch, capsys):
    files = [*FILES, CONFIGS / "trainer" / f"{strategy}.yaml"]
    assert cli(monkeypatch, "plan", "--json", *(f"--config={file}" for file in files)) == 0
    planned = json.loads(capsys.readouterr().out)
    architecture = yaml.safe_load(FILES[1].read_text())["model"]["config"]["init_args"]
    [(whole, first)] = run_ranks(local_bytes, architecture, 0, mesh_shape, world_size=1)
    [(_, last)] = run_ranks(local_bytes, architecture, DEVICES - 1, mesh_shape, world_size=1)
    assert whole == 4 * planned["parameters"]["total"] == 4 * 6_738_415_616
    assert first == planned["memory"]["weights"]  # the plan is of the fullest device
    assert 0 < last <= first
    assert first == pytest.approx(whole / mesh_shape[1], rel=0.001)
