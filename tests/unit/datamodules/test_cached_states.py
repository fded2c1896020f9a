"""The cache of a frozen model's states: what it holds, how it goes on, and what it refuses."""

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from app.errors import ConfigError, DataError
from app.model.weights_hash import weights_hash
from app.model_files.open import load_pretrained
from app.protocols import CorpusOwner, PromptOwner, ResumableData, StateOwner
from app.words import dtype_name
from datamodules import CachedStatesDataModule, TextCodeDataModule
from datamodules.state_cache import filling, shards
from datamodules.state_cache.filling import FrozenModel
from datamodules.state_cache.shards import StateCache
from tests.support.saved_models import save_model
from tests.support.tiny_models import tiny_llama
from tests.unit.datamodules.corpora import fake_trainer, small_datamodule

NUM_ROWS, SEQ_LEN, WIDTH = 13, 16, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A model of the corpus's tokenizer."""
    return save_model(tmp_path_factory.mktemp("model"), tokenizer=small_datamodule(corpus).tokenizer)


@pytest.fixture
def make(corpus: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a datamodule whose training rows take three shards."""
    monkeypatch.setattr(shards, "_SHARD_BYTES", 20_000)

    def make(*, of_corpus: dict[str, Any] | None = None, **settings: Any) -> CachedStatesDataModule:
        own: dict[str, Any] = {
            "pretrained": str(model),
            "exit_layers": [3, 1],
            "num_tokens": NUM_ROWS * SEQ_LEN - 1,
            "dtype": "float32",
            "cache_dir": str(tmp_path / "cache"),
            "batch_size": 3,
        }
        rows = small_datamodule(corpus, **({"tokenizer": str(model), "validation_rows": 2} | (of_corpus or {})))
        return CachedStatesDataModule(corpus=rows, **(own | settings))

    return make


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != ".lock"}


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that went through the model, batch by batch."""
    seen, states = list[int](), FrozenModel.states

    def watched(model: FrozenModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        seen.append(len(input_ids))
        return states(model, input_ids, position_ids)

    monkeypatch.setattr(FrozenModel, "states", watched)
    return seen


def test_it_is_what_modules_and_callbacks_ask_for(make: Any, model: Path) -> None:
    data = make()
    with pytest.raises(DataError, match="no cache of states is here yet"):
        data.setup("fit")
    data.prepare_data()
    for protocol in (CorpusOwner, PromptOwner, ResumableData, StateOwner):
        assert isinstance(data, protocol)
    assert data.state_layers == (1, 3)
    assert data.model_hash == weights_hash(load_pretrained(str(model)).state_dict(), exit_layer=4)
    assert data.seq_len == SEQ_LEN
    assert data.source_names == ("code", "text")
    assert len(data.validation_prompts(2, 4)) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pretrained", None),
        ("exit_layers", []),
        ("exit_layers", [0, 1]),
        ("num_tokens", 0),
        ("dtype", "float64"),
        ("compute_dtype", "float16"),
        ("batch_size", 0),
        ("num_workers", -1),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(make: Any, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: got "):
        make(**{field: value})


def test_an_exit_beyond_the_model_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"exit_layers: got \[1, 4\], allowed 1\.\.3 for a 4-layer model"):
        make(exit_layers=[1, 4]).prepare_data()


def test_every_row_comes_once_an_epoch_with_the_states_of_the_model(make: Any, model: Path, corpus: Path) -> None:
    data = make()
    data.prepare_data()
    rows = small_datamodule(corpus, tokenizer=str(model), batch_size=NUM_ROWS).train_dataloader()
    expected = next(iter(rows))["input_ids"]
    plain = small_datamodule(corpus, tokenizer=str(model), batch_size=3, validation_rows=2)
    batches = list(data.train_dataloader())
    found = torch.cat([batch["input_ids"] for batch in batches])
    assert Counter(map(str, found.tolist())) == Counter(map(str, expected.tolist()))
    assert found.tolist() != expected.tolist()  # shuffled
    held_out = list(data.val_dataloader())
    for batch, as_read in zip(held_out, plain.val_dataloader(), strict=True):
        assert all(torch.equal(batch[name], as_read[name]) for name in as_read)
    frozen = load_pretrained(str(model)).eval()
    for batch in (*batches, *held_out):
        assert batch["states"].shape == (*batch["input_ids"].shape, 3, WIDTH)
        assert {batch[name].dtype for name in ("input_ids", "labels", "position_ids", "source")} == {torch.int64}
        for row in range(len(batch["input_ids"])):
            check_states(frozen, {name: column[row] for name, column in batch.items()})


def check_states(frozen: Any, row: dict[str, Tensor]) -> None:
    """Compare a row's states with those of its documents, which go through the model one at a time."""
    starts = [*torch.nonzero(row["position_ids"] == 0).flatten().tolist(), SEQ_LEN]
    for start, stop in pairwise(starts):
        with torch.no_grad():
            out = frozen(row["input_ids"][None, start:stop], output_hidden_states=True)
        expected = [out.hidden_states[layer][0] for layer in (1, 3, 4)]  # transformers gives the last one normed
        assert torch.allclose(row["states"][start:stop], torch.stack(expected, dim=1), atol=1e-4)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_cache_cut_off_goes_on_and_ends_up_with_the_same_bytes(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[int], after: int
) -> None:
    make(cache_dir=str(tmp_path / "whole")).prepare_data()
    whole, rows = content(tmp_path / "whole"), sum(passed)
    assert rows == NUM_ROWS + 4
    write = StateCache.write_index

    def killed(cache: StateCache) -> None:
        if len(cache.shards) > after:  # a shard that the index does not know yet
            (cache.folder / ".train-000006.safetensors.partial").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        write(cache)

    with monkeypatch.context() as cut:
        cut.setattr(StateCache, "write_index", killed)
        with pytest.raises(KeyboardInterrupt):
            make().prepare_data()
    passed.clear()
    data = make()
    assert isinstance(data, StateOwner)  # which reads the index as it stands
    data.prepare_data()
    assert content(tmp_path / "cache") == whole
    assert len(data.train_dataloader()) == 5
    assert sum(passed) == rows - 2 * after  # shards of two rows


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train-000001", lambda raw: raw[:-1]),
        ("validation-000001", lambda raw: raw[:2000] + b"\0\0" + raw[2002:]),
    ],
)
def test_a_damaged_shard_is_made_anew_and_a_whole_cache_needs_no_pass(
    make: Any,
    tmp_path: Path,
    passed: list[int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: Any,
) -> None:
    make().prepare_data()
    whole, file = content(tmp_path / "cache"), tmp_path / f"cache/{name}.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    passed.clear()
    if name.startswith("validation"):  # then no training row is needed
        monkeypatch.setattr(TextCodeDataModule, "train_dataloader", None)
    make().prepare_data()
    assert (passed, content(tmp_path / "cache")) == ([2], whole)
    assert f"{file.name} is truncated or damaged" in caplog.text
    make().prepare_data()
    assert passed == [2]


def test_a_larger_cache_keeps_the_shards_there_are_and_a_smaller_one_takes_some(make: Any, passed: list[int]) -> None:
    make().prepare_data()
    passed.clear()
    larger = make(num_tokens=16 * SEQ_LEN)
    larger.prepare_data()
    assert passed == [2, 2]  # one row of these was there, in a shard of its own
    assert sum(len(batch["source"]) for batch in larger.train_dataloader()) == 16
    smaller = make(num_tokens=5 * SEQ_LEN)
    smaller.prepare_data()
    assert sum(len(batch["source"]) for batch in smaller.train_dataloader()) == 5
    assert passed == [2, 2]


def test_a_cache_of_something_else_is_refused_by_what_differs(make: Any, tmp_path: Path, model: Path) -> None:
    make().prepare_data()
    other = tmp_path / "other"
    shutil.copytree(model, other)
    changed = tiny_llama(vocab_size=300, max_length=96, tied=False)
    with torch.no_grad():
        changed.model.layers[3].mlp.up_proj.weight[0, 0] += 1.0  # behind all exits: the last states depend on it
    changed.save_pretrained(other)
    for settings, named in (
        ({"pretrained": str(other)}, "model '"),
        ({"exit_layers": [1]}, r"exit_layers \[1\]; this one has \[1, 3\]"),
        ({"dtype": "float16"}, "dtype 'float16'; this one has 'float32'"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype 'bfloat16'; this one has 'float32'"),
        ({"of_corpus": {"seed": 1}}, "corpus seed 1; this one has 0"),
        ({"of_corpus": {"seq_len": 8}}, "corpus seq_len 8; this one has 16"),
        ({"of_corpus": {"validation_rows": 3}}, "corpus validation_rows 3; this one has 2"),
    ):
        with pytest.raises(ConfigError, match=f"cache_dir: got .*cache', allowed a cache with {named}.*another cache_"):
            make(**settings).prepare_data()
    index = tmp_path / "cache/index.json"
    index.write_text(index.read_text().replace('"tokenizer": "', '"tokenizer": "0'))
    with pytest.raises(ConfigError, match="a cache with tokenizer '"):
        make().prepare_data()
    index.write_text("{")
    with pytest.raises(DataError, match=r"index.json is damaged: remove the folder"):
        make().prepare_data()


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_cached(
    make: Any, tmp_path: Path, model: Path
) -> None:
    save_model(tmp_path / "bytes")
    with pytest.raises(ConfigError, match="tokenizer: got "):
        make(pretrained=str(tmp_path / "bytes")).prepare_data()
    assert not (tmp_path / "cache").exists()


def test_a_disk_without_room_is_told_before_the_pass(
    make: Any, passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    with pytest.raises(ConfigError, match=r"on a disk with 0\.108 MB free; this one has 0\.1 MB; lower num_tokens"):
        make().prepare_data()
    assert passed == []


def test_states_that_the_type_cannot_hold_are_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrozenModel, "states", lambda _, ids, __: torch.full((*ids.shape, 3, WIDTH), 1e5))
    with pytest.raises(ConfigError, match="dtype: got 'float16', allowed a type that holds"):
        make(dtype="float16").prepare_data()


def test_text_that_does_not_suffice_is_told(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make().prepare_data()
    assert "lower num_tokens" not in caplog.text
    make(num_tokens=500 * SEQ_LEN, of_corpus={"batch_size": 64}, cache_dir=str(tmp_path / "larger")).prepare_data()
    assert "source code was read" in caplog.text


def test_states_are_kept_and_computed_in_the_types_asked_for(make: Any, tmp_path: Path) -> None:
    exact = held_out_states(make())
    for dtype in (torch.bfloat16, torch.float16):
        short = held_out_states(make(dtype=dtype_name(dtype), cache_dir=str(tmp_path / dtype_name(dtype))))
        assert short.dtype is dtype
        assert torch.equal(exact.to(dtype), short)
    computed = held_out_states(make(compute_dtype="bfloat16", cache_dir=str(tmp_path / "computed")))
    assert computed.dtype is torch.float32
    assert 1e-4 < (computed - exact).norm() / exact.norm() < 0.1


def held_out_states(data: CachedStatesDataModule) -> Tensor:
    data.prepare_data()
    return torch.cat([batch["states"] for batch in data.val_dataloader()])


def train_rows(data: CachedStatesDataModule, **trainer: Any) -> list[list[list[int]]]:
    data.trainer = fake_trainer(**trainer)
    return [batch["input_ids"].tolist() for batch in data.train_dataloader()]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_gets_the_rows_from_its_step_on_also_on_other_ranks(make: Any, workers: int) -> None:
    data = make(num_workers=workers)
    data.prepare_data()
    whole = train_rows(data, accumulate=2)
    assert train_rows(make(), accumulate=2, step=1) == whole[2:]
    of_ranks = [train_rows(make(), num_replicas=2, rank=rank, step=1) for rank in (0, 1)]
    assert [batch for step in zip(*of_ranks, strict=True) for batch in step] == whole[2:]
    data.trainer = fake_trainer(accumulate=2)
    state = json.loads(json.dumps(data.state_dict()))
    for settings, named in (({"seed": 1}, "seed: got 1"), ({"num_tokens": 64}, "rows: got 4, allowed 13")):
        other = make(**settings)
        other.trainer = fake_trainer(accumulate=2)
        with pytest.raises(ConfigError, match=named):
            other.load_state_dict(state)


def test_ranks_take_equal_parts_of_the_held_out_rows(make: Any) -> None:
    data, parts = make(), []
    data.prepare_data()
    whole = [row for batch in data.val_dataloader() for row in batch["input_ids"].tolist()]
    for rank in (0, 1):
        data.trainer = fake_trainer(num_replicas=2, rank=rank)
        parts.append([row for batch in data.val_dataloader() for row in batch["input_ids"].tolist()])
    assert parts[0] + parts[1] == whole
    assert len(parts[0]) == len(parts[1])


def test_a_rank_without_a_row_computes_on_one_without_a_target(make: Any) -> None:
    data = make(num_tokens=5 * SEQ_LEN, batch_size=1)
    data.prepare_data()
    batches = [
        batch
        for rank in range(4)
        for data.trainer in [fake_trainer(num_replicas=4, rank=rank)]
        for batch in data.train_dataloader()
    ]
    empty = [batch for batch in batches if (batch["labels"] == -100).all()]
    assert (len(batches), len(empty)) == (8, 3)
    assert all(batch["states"].shape == (1, SEQ_LEN, 3, WIDTH) for batch in batches)
