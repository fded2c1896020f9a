"""Blocks compiled one by one: the same losses and gradients, few compilations, no graph break, whatever is skipped."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from app.model.compiled_blocks import compile_blocks
from app.model.early_exit import EarlyExitModel
from app.model_files.open import build_model
from tests.support.tiny_models import tiny_config

ROWS, LENGTH = 6, 10
KEEP_SETS = [  # of 3 blocks: samples that enter
    [[0, 1, 2, 3, 4, 5], [1, 2], [0, 3, 4]],
    [[0, 5], [], [1, 2, 3, 4]],
    [[2, 3, 4], [0, 1, 2, 3, 4], []],
    [[], [1, 3, 5], [0, 1]],
    [[0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5], [2, 4]],
]
EXITS = [(3,), (1, 3), (2, 3), (1, 2, 3), (3,)]


def steps(compiled, *, checkpointing=False):
    model = build_model(tiny_config(num_layers=3), seed=0).train()
    network = EarlyExitModel(model)
    if checkpointing:
        model.activation_checkpointing_enable()
    counter = CompileCounter()
    if compiled:
        compile_blocks(model, backend=counter)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for kept, exits in zip(KEEP_SETS, EXITS, strict=True):
        tokens = torch.randint(0, 61, (ROWS, LENGTH), generator=generator)
        positions = torch.arange(LENGTH).expand(ROWS, -1)
        hidden = network.hidden_by_exit(tokens, positions, exits, kept=[*map(torch.tensor, kept)], scales=[1.0] * 3)
        loss = sum(network.head(normed).logsumexp(-1).mean() for normed in hidden.values())
        loss.backward()
        seen.append((loss.item(), [parameter.grad.clone() for parameter in model.parameters()]))
        model.zero_grad()
    model.eval()
    with torch.no_grad():
        seen.append((network.hidden_by_exit(tokens, positions, (3,))[3].sum().item(), []))
    return seen, counter.frame_count


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own looking
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_compute_the_same_and_are_compiled_a_few_times(checkpointing):
    plain, _ = steps(False, checkpointing=checkpointing)
    compiled, compilations = steps(True, checkpointing=checkpointing)
    for (loss, gradients), (other, others) in zip(plain, compiled, strict=True):
        assert other == pytest.approx(loss, rel=1e-6)
        assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(others, gradients, strict=True))
    assert 1 <= compilations <= 4  # for training and for evaluation; not for each block, mask or exit
