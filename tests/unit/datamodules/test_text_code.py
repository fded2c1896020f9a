from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from app.errors import ConfigError, DataError
from app.protocols import PromptOwner, TokenizerOwner
from datamodules import Source, TextCodeDataModule
from tests.unit.datamodules.corpora import by_name, fake_trainer, small_datamodule, two_sources, write_files


def batches(datamodule: TextCodeDataModule, **trainer: Any) -> list[dict[str, Tensor]]:
    datamodule.trainer = fake_trainer(**trainer)
    datamodule.setup("fit")
    return list(datamodule.train_dataloader())


def same(left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(mine[name], other[name]) for mine, other in zip(left, right, strict=True) for name in mine
    )


def test_it_owns_tokenizer_and_prompts(corpus: Path) -> None:
    datamodule = small_datamodule(corpus)
    assert isinstance(datamodule, TokenizerOwner)
    assert isinstance(datamodule, PromptOwner)
    assert datamodule.vocab_size == len(datamodule.tokenizer) == 300  # before setup, as a linked argument needs it
    assert datamodule.source_names == ("code", "text")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sources", {}),
        ("seq_len", 1),
        ("batch_size", 0),
        ("validation_share", 0.0),
        ("validation_share", 1.0),
        ("validation_rows", 0),
        ("vocab_size", 256),
        ("num_workers", -1),
        ("seed", -1),
        ("max_bad_share", 1.5),
    ],
)
def test_a_setting_out_of_range_is_named(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        small_datamodule(tmp_path, **({"sources": by_name(two_sources(tmp_path, count=2))} | {field: value}))
    assert caught.value.field == field


def test_sources_are_named_by_their_keys(tmp_path: Path) -> None:
    sources = {"a": Source(kind="stdlib_code"), "b": Source(kind="stdlib_text", name="other")}
    assert small_datamodule(tmp_path, sources=sources).source_names == ("a", "b")


def test_a_vocab_size_without_effect_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small_datamodule(tmp_path, tokenizer="somewhere")
    assert "vocab_size has no effect" in caplog.text


def test_batches_have_the_promised_form(corpus: Path) -> None:
    batch = batches(small_datamodule(corpus))[0]
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (2, 16)),
        "labels": (torch.int64, (2, 16)),
        "position_ids": (torch.int64, (2, 16)),
        "source": (torch.int64, (2,)),
    }


def test_weights_are_shares_of_tokens(corpus: Path) -> None:
    sources = torch.cat([batch["source"] for batch in batches(small_datamodule(corpus))])
    assert (sources == 0).double().mean().item() == pytest.approx(0.75, abs=0.05)


def test_workers_change_no_batch(corpus: Path) -> None:
    alone = batches(small_datamodule(corpus))
    assert same(batches(small_datamodule(corpus, num_workers=2)), alone)
    assert not same(batches(small_datamodule(corpus, seed=1)), alone)


def test_iterating_leaves_the_global_generator_alone(corpus: Path) -> None:
    state = torch.get_rng_state()
    batches(small_datamodule(corpus))
    assert torch.equal(torch.get_rng_state(), state)


def test_resuming_continues_and_ranks_share(corpus: Path) -> None:
    whole = batches(small_datamodule(corpus), accumulate=2)
    assert same(batches(small_datamodule(corpus), accumulate=2, step=3), whole[6:])
    ranks = [batches(small_datamodule(corpus), world_size=2, rank=rank) for rank in (0, 1)]
    interleaved = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert same(interleaved[:20], whole[:20])


def test_less_than_one_batch_is_refused_with_the_numbers(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"\d+ training rows of 16 tokens are less than one batch of 2000000"):
        batches(small_datamodule(corpus, batch_size=1_000_000), world_size=2)


def test_validation_rows_are_limited_ordered_and_divided_equally(corpus: Path) -> None:
    datamodule = small_datamodule(corpus, validation_rows=5, batch_size=3)
    datamodule.setup("validate")
    rows = torch.cat([batch["source"] for batch in datamodule.val_dataloader()])
    assert rows.tolist() == [0, 1] * 5
    everything = torch.cat([batch["input_ids"] for batch in datamodule.val_dataloader()])
    parts = []
    for rank in range(3):
        datamodule.trainer = fake_trainer(rank=rank, world_size=3)
        parts.append(torch.cat([batch["input_ids"] for batch in datamodule.val_dataloader()]))
    assert [len(part) for part in parts] == [3, 3, 3]
    assert torch.equal(torch.cat(parts), everything[:9])
    for loader in (datamodule.test_dataloader(), datamodule.predict_dataloader()):
        assert torch.equal(torch.cat([batch["input_ids"] for batch in loader]), parts[-1])


def test_nothing_held_out_names_the_fix(tmp_path: Path) -> None:
    datamodule = small_datamodule(tmp_path, sources=by_name(two_sources(tmp_path, count=4)), validation_share=1e-9)
    with pytest.raises(DataError, match="raise validation_share"):
        datamodule.val_dataloader()
    with pytest.raises(DataError, match="raise validation_share"):
        datamodule.validation_prompts(1, 4)


def test_prompts_are_fixed_beginnings_of_held_out_documents_in_turn(corpus: Path) -> None:
    datamodule = small_datamodule(corpus)
    prompts = datamodule.validation_prompts(6, 8)
    assert prompts == datamodule.validation_prompts(6, 8) == small_datamodule(corpus, seed=9).validation_prompts(6, 8)
    assert [len(prompt) for prompt in prompts] == [8] * 6
    texts = {file: file.read_text() for file in corpus.glob("*/*.txt")}
    beginnings = [datamodule.tokenizer.decode(prompt) for prompt in prompts]
    found = [[file for file, text in texts.items() if text.startswith(start)] for start in beginnings]
    assert [files[0].parent.name for files in found] == ["code", "text"] * 3
    train = {
        datamodule.tokenizer.decode(rows.document(index).tolist())
        for rows in datamodule._store.rows["train"]
        for index in range(rows.num_documents)
    }
    assert all(texts[file] not in train for files in found for file in files)


def test_short_documents_give_shorter_prompts_after_the_long_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_files(tmp_path / "short", count=30, seed=0, words=30)
    datamodule = small_datamodule(tmp_path, sources={"short": Source(kind="files", path=str(folder))})
    lengths = [len(prompt) for prompt in datamodule.validation_prompts(1000, 90)]
    assert all(left >= right >= 1 for left, right in pairwise(lengths))
    assert lengths[-1] < 90
    assert "1000 prompts asked for" in caplog.text


def test_token_counts_are_those_of_the_documents(corpus: Path) -> None:
    datamodule = small_datamodule(corpus)
    counted = {"code": 0, "text": 0}
    for file in corpus.glob("*/*.txt"):
        counted[file.parent.name] += len(datamodule.tokenizer(file.read_text())["input_ids"]) + 1
    train, held_out = datamodule.token_counts("train"), datamodule.token_counts("validation")
    assert {name: train[name] + held_out[name] for name in counted} == counted


def saved(corpus: Path, **trainer: Any) -> dict[str, int | str]:
    datamodule = small_datamodule(corpus)
    datamodule.trainer = fake_trainer(**trainer)
    return datamodule.state_dict()


def test_the_saved_state_is_plain(corpus: Path) -> None:
    assert {type(value) for value in saved(corpus).values()} == {int, str}


@pytest.mark.parametrize(
    ("settings", "trainer", "field"),
    [
        ({"seed": 1}, {}, "seed"),
        ({"batch_size": 3}, {}, "batch_size"),
        ({"seq_len": 17}, {}, "seq_len"),
        ({"vocab_size": 299}, {}, "corpus"),
        ({}, {"accumulate": 2}, "trainer.accumulate_grad_batches"),
        ({}, {"world_size": 2}, "world_size"),
    ],
)
def test_resuming_in_another_order_is_refused_in_fit_only(
    corpus: Path, settings: dict[str, int], trainer: dict[str, int], field: str
) -> None:
    state = saved(corpus)
    datamodule = small_datamodule(corpus, **settings)
    for stage in (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING):
        datamodule.trainer = fake_trainer(**trainer, fn=stage)
        datamodule.load_state_dict(state)
    datamodule.trainer = fake_trainer(**trainer)
    with pytest.raises(ConfigError, match="as in the checkpoint") as caught:
        datamodule.load_state_dict(state)
    assert caught.value.field == field


def test_resuming_in_the_same_order_is_accepted_and_other_weights_are_not(corpus: Path) -> None:
    state = saved(corpus)
    datamodule = small_datamodule(corpus)
    datamodule.trainer = fake_trainer(step=4)
    datamodule.load_state_dict(state)
    with pytest.raises(ConfigError, match="sources"):
        datamodule.load_state_dict(state | {"sources": "code=1.0, text=1.0"})


def test_a_trainer_that_would_divide_batches_again_is_refused(corpus: Path) -> None:
    datamodule = small_datamodule(corpus)
    datamodule.trainer = fake_trainer(world_size=2, use_distributed_sampler=True)
    with pytest.raises(ConfigError, match="use_distributed_sampler"):
        datamodule.setup("fit")
    datamodule.trainer = fake_trainer(use_distributed_sampler=True)  # one device: nothing to divide
    datamodule.setup("fit")
    datamodule.trainer = fake_trainer(overfit_batches=1)
    with pytest.raises(ConfigError, match="overfit_batches"):
        datamodule.setup("fit")
