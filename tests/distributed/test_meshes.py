"""FSDP2, HSDP and tensor parallelism train as one process does with the same global batch."""

from functools import cache, partial
from typing import Any, NamedTuple

import pytest
from lightning.pytorch.strategies import DDPStrategy

import app.training.module as module_under_test
from app.errors import ConfigError
from app.training.strategy import MeshStrategy, mesh_sizes
from tests.support.mesh_runs import assert_equal, train
from tests.support.processes import run_ranks


class Mesh(NamedTuple):
    """A strategy and what it is to be compared with."""

    replicas: int  # data-parallel ranks
    parts: int = 1  # tensor-parallel ranks of each
    settings: dict[str, Any] | None = None  # of MeshStrategy; None: DDP

    @property
    def ranks(self) -> int:
        return self.replicas * self.parts

    def strategy(self):
        return DDPStrategy(process_group_backend="gloo") if self.settings is None else MeshStrategy(**self.settings)


DDP = Mesh(2)
FSDP2 = Mesh(2, settings={})
HSDP = Mesh(4, settings={"replicate_size": 2})
TENSOR_PARALLEL = Mesh(1, parts=2, settings={"tensor_parallel_size": 2})
BOTH = Mesh(2, parts=2, settings={"tensor_parallel_size": 2, "data_parallel_size": 2})
COPIES = Mesh(2, parts=2, settings={"tensor_parallel_size": 2, "replicate_size": 2})


@cache
def single(root, *settings):
    return train(root, **dict(settings))


def spread(root, mesh, settings):
    return train(root, ranks=mesh.ranks, replicas=mesh.replicas, strategy=mesh.strategy(), **settings)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mesh", "reference", "own"),
    [
        (DDP, {"curriculum": "fixed"}, {"activation_checkpointing": True}),
        (FSDP2, {"curriculum": "rotational"}, {}),
        (FSDP2, {"curriculum": "gradual"}, {"activation_checkpointing": True}),
        (HSDP, {"curriculum": "gradual", "steps": 2}, {}),
        (TENSOR_PARALLEL, {"curriculum": "rotational", "tied": False}, {"activation_checkpointing": True}),
        (BOTH, {"curriculum": "fixed", "steps": 2}, {}),
        pytest.param(COPIES, {"curriculum": "rotational", "steps": 2}, {}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_ranks_train_as_one_process_with_the_same_global_batch(root, mesh, reference, own):
    expected = single(root, *reference.items())
    runs = run_ranks(spread, root, mesh, reference | own, world_size=mesh.ranks)
    for run in runs:
        assert (run["sharded"] > 0) == (mesh.settings is not None)
        assert_equal(run, expected)
        assert all((run["weights"][name] == value).all() for name, value in runs[0]["weights"].items())
    assert any(1.0 in shares for shares in runs[0]["dropped"])  # a block that nobody went through
    assert len({str(run["rows"]) for run in runs}) == mesh.replicas  # tensor-parallel ranks share their rows
    if mesh is FSDP2:  # to gather forward and backward, to scatter gradients; a skipped block costs nothing
        blocks = [sum(share < 1 for share in shares) for shares in runs[0]["dropped"]]
        assert runs[0]["collectives"] == [3 + 3 * run for run in blocks]  # one to agree on what is skipped
        assert len(set(blocks)) > 1


def spread_compiled(root, mesh, settings):
    module_under_test.compile_blocks = partial(module_under_test.compile_blocks, backend="eager")
    return spread(root, mesh, settings | {"compile_blocks": True})


@pytest.mark.slow  # each rank compiles
@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own looking
def test_compiled_blocks_train_the_same_under_fsdp2(root):
    reference = {"curriculum": "rotational"}
    for run in run_ranks(spread_compiled, root, FSDP2, reference, limit_seconds=500):
        assert_equal(run, single(root, *reference.items()))


def test_another_curriculum_is_seen(root):
    with pytest.raises(AssertionError):
        assert_equal(single(root, ("curriculum", "gradual")), single(root, ("curriculum", "fixed")))


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, (1, 16, 1)),
        ({"replicate": "auto"}, (2, 8, 1)),
        ({"replicate": "auto", "tensor_parallel": 4}, (2, 2, 4)),
        ({"data_parallel": 4, "tensor_parallel": 4}, (1, 4, 4)),
    ],
)
def test_auto_is_what_the_other_sizes_leave(settings, sizes):
    assert mesh_sizes(16, num_nodes=2, **settings) == sizes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 3}, "tensor_parallel_size: got 3, allowed a divisor of 16"),
        ({"replicate": 0}, "replicate_size: got 0, allowed a divisor of 16"),
        ({"data_parallel": 4}, "data_parallel_size: got '1 x 4 x 1 = 4', allowed .* = 16"),
    ],
)
def test_sizes_that_do_not_fill_the_devices_are_refused_with_both_numbers(settings, message):
    with pytest.raises(ConfigError, match=message):
        mesh_sizes(16, num_nodes=2, **settings)
