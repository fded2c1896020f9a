import pytest
import torch

from app.errors import ConfigError
from app.training.batch import check_batch, completed
from tests.support.tiny_models import tiny_config

IDS = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(0))
INPUTS, NEXT = IDS[:, :-1], IDS[:, 1:]
ANSWERS = torch.arange(8) >= 5  # what a row of instructions learns
POSITIONS = torch.arange(8).expand(3, -1)


def check(num_sources=2, **batch):
    check_batch(
        {"input_ids": INPUTS, "labels": NEXT} | batch, config=tiny_config(max_length=8), num_sources=num_sources
    )


def test_missing_positions_and_sources_have_defaults():
    batch = completed({"input_ids": INPUTS, "labels": NEXT})
    assert torch.equal(batch["position_ids"], POSITIONS)
    assert torch.equal(batch["source"], torch.zeros(3, dtype=torch.int64))
    given = {"input_ids": INPUTS, "labels": NEXT, "position_ids": POSITIONS % 4, "source": torch.arange(3)}
    assert completed(given) == given


UNSHIFTED = r"batch\.labels: got 'the inputs at their own positions', allowed the next tokens"
REFUSED = {
    UNSHIFTED: {"labels": INPUTS.clone()},
    UNSHIFTED + "; the model does not": {"labels": INPUTS.where(ANSWERS, -100)},
    r"batch\.input_ids: got 'float32 \(3, 8\)', allowed int64 \(rows, ": {"input_ids": INPUTS.float()},
    r"batch\.input_ids: got 'int64 \(8,\)'": {"input_ids": INPUTS[0]},
    r"batch\.input_ids: got 'int64 \(3, 0\)'": {"input_ids": INPUTS[:, :0]},
    r"batch\.input_ids: got 'list'": {"input_ids": INPUTS.tolist()},
    r"batch\.input_ids: tokens a row: got 9, allowed 1\.\.8": {"input_ids": IDS, "labels": IDS.roll(-1)},
    r"batch\.input_ids: got 61, allowed 0\.\.60": {"input_ids": INPUTS.clone().fill_(61)},
    r"batch\.labels: got -1, allowed 0\.\.60; or -100": {"labels": NEXT.clone().fill_(-1)},
    r"batch\.labels: got 'int64 \(3, 7\)', allowed int64 \(3, 8\), as": {"labels": NEXT[:, 1:]},
    r"batch\.labels: got 'int32 \(3, 8\)'": {"labels": NEXT.int()},
    r"batch\.position_ids: got 8, allowed 0\.\.7; they restart": {"position_ids": POSITIONS + 1},
    r"batch\.source: got 2, allowed 0\.\.1; .*source_names": {"source": torch.arange(3)},
    r"batch\.source: got 'int64 \(3, 8\)', allowed int64 \(3,\)": {"source": NEXT},
    r"batch\.attention_mask: got 'int64 \(3, 8\)'.* pad at the right": {"attention_mask": (POSITIONS > 0).long()},
    r"batch\.attention_mask: got 'bool \(3, 1, 8, 8\)'": {"attention_mask": torch.ones(3, 1, 8, 8, dtype=torch.bool)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_batch_that_cannot_be_meant_is_refused_by_name(message):
    with pytest.raises(ConfigError, match=message):
        check(**REFUSED[message])


@pytest.mark.parametrize("batch", [[INPUTS, NEXT], {"input_ids": INPUTS}])
def test_what_is_no_batch_is_refused(batch):
    with pytest.raises(ConfigError, match=r"batch: got .* allowed a dict of input_ids, labels, position"):
        check_batch(batch, config=tiny_config(), num_sources=1)


PADDED = torch.cat([NEXT[:, :6], torch.full((3, 2), -100)], dim=1)
RUNS = torch.arange(27).view(3, 9)
FINE = {
    "one token throughout": {"input_ids": torch.full((3, 8), 7), "labels": torch.full((3, 8), 7)},
    "runs of equal tokens": {"input_ids": RUNS[:, :-1] // 4, "labels": RUNS[:, 1:] // 4},
    "nothing to learn": {"labels": torch.full((3, 8), -100)},
    "a class at the end of a row": {"labels": INPUTS.where(torch.arange(8) == 7, -100)},
    "padding at the right": {"labels": PADDED, "attention_mask": POSITIONS < 6},
    "documents": {"position_ids": POSITIONS % 4, "source": torch.arange(3) % 2},
}  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_unusual_batches_pass(name):
    check(**FINE[name])


def test_what_nobody_reads_is_warned_of(caplog):
    check(loss_mask=ANSWERS)
    assert "of the batch, loss_mask are not read" in caplog.text
