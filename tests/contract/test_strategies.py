"""Strategies on the command line: what cannot train here is refused before a process starts; plan knows the others."""

from contextlib import nullcontext
from pathlib import Path

import pytest
from jsonargparse import Namespace

from app.cli.strategies import check_launch, check_strategy
from app.errors import ConfigError
from tests.contract.test_plan import plan, plan_json  # noqa: F401  # fixtures

TRAINER = Path(__file__).parents[2] / "configs" / "trainer"
MESH = "--trainer.strategy=MeshStrategy"
SIZES = "trainer.strategy.init_args"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.strategy=fsdp"], "trainer.strategy: got 'fsdp', allowed auto | ddp | MeshStrategy"),
        (["--trainer.strategy=fsdp_cpu_offload"], "configs/trainer/fsdp2.yaml has app.training.strategy.MeshStrategy"),
        (
            ["--trainer.strategy=FSDPStrategy"],
            "trainer.strategy: got 'FSDPStrategy', allowed auto | ddp | MeshStrategy",
        ),
        (["--trainer.strategy=DDPStrategy"], "a class is given as {class_path: lightning.pytorch.strategies.NAME}"),
        (["--trainer.strategy=ddp_notebook"], "trainer.strategy: got 'ddp_notebook', allowed auto | ddp |"),
        (["--trainer.strategy=ddp_fork_find_unused_parameters_true"], "locks and threads; ddp starts them afresh"),
        (
            ["--trainer.strategy=DDPStrategy", f"--{SIZES}.start_method=spawn"],
            "start_method: got 'spawn', allowed popen",
        ),
        ([MESH, f"--{SIZES}.tensor_parallel_size=3"], f"{SIZES}.tensor_parallel_size: got 3, allowed a divisor of 16"),
        ([MESH, f"--{SIZES}.data_parallel_size=4"], f"{SIZES}.data_parallel_size: got '1 x 4 x 1 = 4', allowed"),
        ([MESH, f"--{SIZES}.data_parallel_size=few"], "data_parallel_size"),
        ([MESH, f"--{SIZES}.tensor_parallel_size=2"], "got 2, allowed 1: plan does not count tensor parallelism"),
    ],
)
def test_what_cannot_be_is_told_in_one_message(plan, arguments, message):  # noqa: F811
    error = plan(*arguments, status=2).err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "given",
    [
        "MeshStrategy",
        "app.training.strategy.MeshStrategy",
        Namespace(class_path="lightning.pytorch.strategies.ModelParallelStrategy", init_args=Namespace(timeout=None)),
        Namespace(class_path="app.training.strategy.MeshStrategy"),
    ],
)
def test_the_mesh_is_what_every_way_to_name_it_gives(given):
    trainer = Namespace(strategy=given, devices="2", num_nodes=2)
    check_strategy(trainer)
    assert trainer.strategy.class_path == "app.training.strategy.MeshStrategy"
    if "init_args" in trainer.strategy:
        settings = trainer.strategy.init_args
        assert (settings.replicate_size, settings.data_parallel_size, settings.tensor_parallel_size) == (1, "auto", 1)


SLURM = {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "job", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}


@pytest.mark.filterwarnings("ignore:The `srun` command is available")
@pytest.mark.parametrize(
    ("environment", "devices", "num_nodes", "message"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"},
            1,
            2,
            r"got '1 with .*allowed as many as were started; .*world size \(4\)",
        ),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"}, "2", 2, None),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"}, "auto", 1, None),  # Lightning knows
        (SLURM, 8, 1, r"trainer.devices: got '8 with .*--ntasks-per-node=4"),
        (SLURM, [0, 1, 2, 3], 1, "with trainer.num_nodes 1', .*--nodes=2"),
        (SLURM, 4, 2, None),
        (SLURM | {"SLURM_JOB_NAME": "interactive"}, 1, 1, None),
    ],
)
def test_as_many_processes_train_as_were_started(environment, devices, num_nodes, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trainer = Namespace(strategy="ddp", devices=devices, num_nodes=num_nodes, accelerator="auto")
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        check_launch(trainer)


def test_more_processes_than_cores_are_remarked_on(caplog):
    for devices in (1, 10_000):
        check_launch(Namespace(strategy="ddp", devices=devices, num_nodes=1, accelerator="cpu"))
    assert [record.getMessage().split(" on ")[0] for record in caplog.records] == ["trainer.devices: 10000 processes"]


@pytest.mark.parametrize(("config", "shards"), [("fsdp2", 16), ("hsdp", 8)])
def test_plan_counts_shards_and_weights_gathered_in_the_type_of_the_products(plan_json, config, shards):  # noqa: F811
    given = ("--config", str(TRAINER / f"{config}.yaml"))
    found, exact = plan_json(*given), plan_json(*given, "--trainer.precision=32-true")
    assert found["layout"]["shards"] == shards
    assert found["memory"]["weights"] == exact["memory"]["weights"]  # the shards stay float32
    assert found["memory"]["weight_copies"] == 0 < found["memory"]["communication"]
    assert found["memory"]["communication"] < 0.7 * exact["memory"]["communication"]
    assert found["memory"]["activations"] < 0.7 * exact["memory"]["activations"]
