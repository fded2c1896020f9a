"""Precisions: what is stored, gathered and computed in which type, and that training stays near float32's."""

import pytest
import torch
from lightning.pytorch import Callback

from app.model_files.open import build_model
from app.training.strategy import MeshStrategy
from tests.support.mesh_runs import train
from tests.support.processes import run_ranks
from tests.support.runs import NUM_LAYERS
from tests.support.tiny_models import tiny_config

BF16, F32 = torch.bfloat16, torch.float32


class Types(Callback):
    """Of shards and gradients, of what the head computes with, of the rotary table; and whether autocast is on."""

    def __init__(self):
        self.seen = {}

    def on_fit_start(self, trainer, pl_module):
        model, table = pl_module.model, pl_module.model.model.rotary_emb.inv_freq
        reference = build_model(tiny_config(num_layers=NUM_LAYERS, max_length=128), seed=0).model.rotary_emb.inv_freq
        self.seen["table is exact"] = torch.equal(table, reference)
        model.lm_head.register_forward_hook(self._look)
        model.get_decoder().layers[0].mlp.register_forward_hook(self._look_inside)

    def _look(self, head, args, out):
        self.seen["head"], self.seen["autocast"] = head.weight.dtype, torch.is_autocast_enabled("cpu")
        self.seen["losses"] = {value.dtype for value in out} if isinstance(out, tuple) else {out.dtype}

    def _look_inside(self, mlp, args, out):
        self.seen["block"] = mlp.down_proj.weight.dtype

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = list(pl_module.parameters())
        self.seen["shards"] = {parameter.dtype for parameter in parameters}
        self.seen["gradients"] = {parameter.grad.dtype for parameter in parameters}


def run(root, precision, mesh):
    types = Types()
    ranks = 1 if mesh is None else 2
    settings = {} if mesh is None else {"replicas": 2 // mesh.get("tensor_parallel_size", 1)}
    strategy = "auto" if mesh is None else MeshStrategy(**mesh)
    made = train(
        root, ranks=ranks, strategy=strategy, precision=precision, dropout=0.5, extra=(types,), steps=3, **settings
    )
    return types.seen, made["losses"], made["metrics"]["val/loss"]


MESHES = {"fsdp2": {}, "tensor parallel": {"tensor_parallel_size": 2}}


@pytest.fixture(scope="module")
def exact(root):
    return run(root, "32-true", None)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mesh", "precision", "stored"),
    [("fsdp2", "bf16-mixed", F32), ("fsdp2", "bf16-true", BF16), ("tensor parallel", "bf16-mixed", F32)],
)
def test_fsdp2_gathers_and_computes_in_bfloat16_and_autocast_is_off(root, exact, mesh, precision, stored):
    for seen, losses, held_out in run_ranks(run, root, precision, MESHES[mesh]):
        assert seen["shards"] == seen["gradients"] == {stored}
        assert seen["head"] == seen["block"] == BF16
        assert seen["losses"] == {F32}
        assert not seen["autocast"]
        assert seen["table is exact"]
        assert losses == pytest.approx(exact[1], abs=0.03)
        assert losses != exact[1]
        assert held_out == pytest.approx(exact[2], abs=0.03)


@pytest.mark.parametrize(("precision", "stored", "autocast"), [("bf16-true", BF16, False), ("bf16-mixed", F32, True)])
def test_on_one_device_lightning_converts_or_casts_and_the_rotary_table_stays(root, exact, precision, stored, autocast):
    seen, losses, _ = run(root, precision, None)
    assert seen["shards"] == {stored}
    assert seen["autocast"] == autocast
    assert seen["table is exact"]
    assert losses == pytest.approx(exact[1], abs=0.03)
    assert losses != exact[1]
