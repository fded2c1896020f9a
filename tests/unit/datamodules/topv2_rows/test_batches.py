import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from app.layerskip.early_exit_loss import IGNORE_INDEX
from datamodules.topv2_rows.rows import ExampleRows
from datamodules.topv2_rows.store import Examples
from tests.support.tiny_models import tiny_llama

PROMPT_LENGTHS = (3, 1, 7, 2, 5)
TARGET_LENGTHS = (4, 6, 2, 9, 1)  # with the end-of-text token
PACKED = [[0, 3], [2, 4, 1]]


@pytest.fixture(scope="module")
def examples() -> Examples:
    lengths = np.add(PROMPT_LENGTHS, TARGET_LENGTHS)
    return Examples(
        tokens=np.random.default_rng(0).integers(1, 61, size=lengths.sum(), dtype=np.int32),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        prompt_lengths=np.asarray(PROMPT_LENGTHS, dtype=np.int32),
        sources=np.asarray([0, 1, 0, 1, 0]),
        references=["?"] * 5,
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(num_layers=3, vocab_size=61)


def collate(examples: Examples, rows: list[list[int]], *, length_multiple: int = 8) -> dict[str, torch.Tensor]:
    data = ExampleRows(examples, rows, length_multiple=length_multiple)
    return data.collate([data[row] for row in range(len(data))])


def logits(model: LlamaForCausalLM, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False).logits
    return out


def test_a_batch_has_the_promised_form(examples: Examples) -> None:
    batch = collate(examples, [[0], [3]])
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (2, 16)),
        "labels": (torch.int64, (2, 16)),
        "position_ids": (torch.int64, (2, 16)),
        "source": (torch.int64, (2,)),
    }
    assert batch["source"].tolist() == [0, 1]
    assert batch["position_ids"].tolist() == [list(range(16))] * 2  # no restart: attention keeps its fast path


@pytest.mark.parametrize(("length_multiple", "length"), [(1, 10), (4, 12), (8, 16), (16, 16)])
def test_rows_are_padded_to_the_longest_rounded_up(examples: Examples, length_multiple: int, length: int) -> None:
    batch = collate(examples, [[0], [3]], length_multiple=length_multiple)
    assert batch["input_ids"].shape == (2, length)


@pytest.mark.parametrize("rows", [[[0], [1], [2], [3], [4]], PACKED])
def test_every_target_token_is_a_label_once_and_nothing_else_is(examples: Examples, rows: list[list[int]]) -> None:
    batch = collate(examples, rows)
    for number, row in enumerate(rows):
        expected = [IGNORE_INDEX] * batch["labels"].shape[1]
        start = 0
        for index in row:  # the slow twin: position by position
            tokens = examples.example(index).tolist()
            for position, following in enumerate(tokens[1:]):
                assert batch["input_ids"][number, start + position] == tokens[position]
                assert batch["position_ids"][number, start + position] == position
                if position + 1 >= PROMPT_LENGTHS[index]:
                    expected[start + position] = following
            start += len(tokens) - 1
        assert batch["labels"][number].tolist() == expected
    assert int((batch["labels"] != IGNORE_INDEX).sum()) == sum(TARGET_LENGTHS)


@pytest.mark.parametrize("rows", [[[0], [1], [2], [3], [4]], PACKED])
def test_examples_in_a_batch_get_the_logits_they_get_alone(
    examples: Examples, model: LlamaForCausalLM, rows: list[list[int]]
) -> None:
    batch = collate(examples, rows)
    together = logits(model, batch["input_ids"], batch["position_ids"])
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            tokens = torch.from_numpy(examples.example(index)[:-1]).long()
            alone = logits(model, tokens[None])[0]
            inside = together[number, start : start + len(tokens)]
            torch.testing.assert_close(inside, alone, atol=1e-6 * float(alone.abs().max()), rtol=0)
            start += len(tokens)


def test_examples_in_a_row_would_see_one_another_if_positions_did_not_restart(
    examples: Examples, model: LlamaForCausalLM
) -> None:
    """Negative control of the test above."""
    batch = collate(examples, PACKED)
    apart = logits(model, batch["input_ids"], batch["position_ids"])
    leaking = logits(model, batch["input_ids"], torch.arange(batch["input_ids"].shape[1])[None].expand(2, -1))
    second = int(examples.lengths[0])
    assert torch.allclose(apart[0, :second], leaking[0, :second], atol=1e-4)
    assert not torch.allclose(apart[0, second], leaking[0, second], atol=1e-2)
