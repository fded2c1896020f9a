"""Two hosts with a network of their own between them, launched by torchrun: the run of one process."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from app.checkpoints.weights import open_trained_weights
from tests.support.runs import write_corpus
from tests.support.stream_runs import losses, write_config
from tests.support.two_hosts import available, torchrun, two_hosts

STEPS, GLOBAL_BATCHES = 6, 4
SETTINGS = (
    "--model.optimizer=torch.optim.SGD",  # Adam's first steps are signs: they would blow rounding up
    "--model.optimizer.lr=0.3",
    "--data.num_lanes=4",
)
MESH = "--trainer.strategy=app.training.strategy.MeshStrategy"


class Case(NamedTuple):
    ranks_per_host: int
    replicas: int  # ranks with rows of their own
    options: list[str]


CASES = {
    "ddp 2 x 1": Case(1, 2, ["--trainer.strategy=ddp"]),
    "ddp 2 x 2": Case(2, 4, ["--trainer.strategy=ddp"]),
    "fsdp2 2 x 1": Case(1, 2, [MESH]),
    "fsdp2 2 x 2": Case(2, 4, [MESH]),
    "a copy a host, sharded within it": Case(2, 4, [MESH, "--trainer.strategy.replicate_size=auto"]),
    "blocks split within a host": Case(2, 2, [MESH, "--trainer.strategy.tensor_parallel_size=2"]),
}


def fit(root: Path, *extra: str) -> list[str]:
    root.mkdir()
    sources = {"code": {"kind": "files", "path": str(write_corpus(root / "corpus"))}}
    config = write_config(root, sources, max_steps=STEPS, checkpoint_every=5)
    return ["-m", "app", "fit", "--config", str(config), *SETTINGS, *extra]


def weights(root: Path) -> dict[str, object]:
    saved = open_trained_weights(root / "run" / "checkpoints" / "last.ckpt")
    return {name: saved.read(name) for name in saved.shapes}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    root = tmp_path_factory.mktemp("run") / "alone"
    command = fit(root, f"--trainer.accumulate_grad_batches={GLOBAL_BATCHES}")
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return root


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not available(), reason="this machine makes no network namespaces")
@pytest.mark.parametrize("case", CASES)
def test_two_nodes_train_as_one_process_with_the_same_global_batch(tmp_path, alone, case):
    ranks_per_host, replicas, options = CASES[case]
    command = fit(
        tmp_path / "spread",
        f"--trainer.accumulate_grad_batches={GLOBAL_BATCHES // replicas}",
        "--trainer.num_nodes=2",
        f"--trainer.devices={ranks_per_host}",
        *options,
    )
    with two_hosts() as hosts:
        torchrun(hosts, *command, ranks_per_host=ranks_per_host, limit_seconds=200)
    expected = losses(alone / "run")
    assert len(expected) == STEPS
    assert losses(tmp_path / "spread" / "run") == pytest.approx(expected, abs=1e-6)
    after = weights(tmp_path / "spread")
    for name, weight in weights(alone).items():
        assert (after[name] - weight).abs().max() < 1e-6, name
