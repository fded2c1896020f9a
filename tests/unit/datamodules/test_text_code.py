import json
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from app.errors import ConfigError, DataError
from app.protocols import CorpusOwner, PromptOwner, TokenizerOwner
from datamodules import Source, TextCodeDataModule
from datamodules.readers.records import Document
from tests.support.tokenizers import llama
from tests.unit.datamodules.corpora import (
    Batches,
    by_name,
    fake_trainer,
    same,
    small_datamodule,
    two_sources,
    write_files,
)


def train(datamodule: TextCodeDataModule, count: int, *, step: int = 0, **trainer: Any) -> Batches:
    """Hand over `count` batches as a trainer does; it has taken a step with each."""
    datamodule.trainer = fake_trainer(step=step, **trainer)
    datamodule.setup("fit")
    batches = []
    for batch in islice(datamodule.train_dataloader(), count):
        batches.append(datamodule.on_before_batch_transfer(batch, 0))
        datamodule.trainer.global_step += len(batches) % datamodule.trainer.accumulate_grad_batches == 0
    return batches


def resumed(corpus: Path, state: dict[str, Any], *, step: int, **settings: Any) -> TextCodeDataModule:
    trainer = settings.pop("trainer", {})
    datamodule = small_datamodule(corpus, **settings)
    datamodule.trainer = fake_trainer(step=step, **trainer)
    datamodule.setup("fit")
    datamodule.load_state_dict(json.loads(json.dumps(state)))
    return datamodule


def test_it_owns_tokenizer_corpus_and_prompts(corpus: Path) -> None:
    datamodule = small_datamodule(corpus)
    assert isinstance(datamodule, TokenizerOwner)
    assert isinstance(datamodule, CorpusOwner)
    assert isinstance(datamodule, PromptOwner)
    assert datamodule.vocab_size == len(datamodule.tokenizer) == 300  # before setup, as a linked argument needs it
    assert datamodule.source_names == ("code", "text")
    assert datamodule.source_weights == {"code": 0.75, "text": 0.25}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sources", {}),
        ("seq_len", 1),
        ("batch_size", 0),
        ("packing", "worst_fit"),
        ("long_documents", "drop"),
        ("shuffle_megabytes", -1.0),
        ("shuffle_megabytes", float("nan")),
        ("num_lanes", 0),
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


def test_a_weight_beside_none_warns_of_the_shares_that_follow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    python = Source(kind="stdlib_code")
    small_datamodule(tmp_path, sources={"mine": python, "python": python})
    small_datamodule(tmp_path, sources=dict.fromkeys(("mine", "python"), replace(python, weight=0.7)))
    assert not caplog.records
    mixed = small_datamodule(tmp_path, sources={"mine": replace(python, weight=0.7), "python": python})
    assert (
        "python has no weight and counts with 1.0, so that shares of tokens are: mine 41.2%, python 58.8%"
        in caplog.text
    )
    assert mixed.source_weights == {"mine": 0.7 / 1.7, "python": 1 / 1.7}


def test_a_vocab_size_without_effect_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small_datamodule(tmp_path, tokenizer="somewhere", vocab_size=4096)  # the default: nothing was asked for
    assert not caplog.records
    small_datamodule(tmp_path, tokenizer="somewhere")
    assert "vocab_size has no effect: the tokenizer in somewhere is used" in caplog.text


def test_batches_have_the_promised_form(corpus: Path) -> None:
    batch = train(small_datamodule(corpus), 1)[0]
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (2, 16)),
        "labels": (torch.int64, (2, 16)),
        "position_ids": (torch.int64, (2, 16)),
        "source": (torch.int64, (2,)),
    }


def test_weights_are_shares_of_tokens_and_what_was_delivered_is_counted(corpus: Path) -> None:
    datamodule = small_datamodule(corpus)
    sources = torch.cat([batch["source"] for batch in train(datamodule, 100)])
    assert (sources == 0).sum().item() == pytest.approx(150, abs=1)
    code, text = datamodule.source_statistics().values()
    assert (code.rows, text.rows) == ((sources == 0).sum().item(), (sources == 1).sum().item())
    assert code.tokens == 16 * code.rows
    assert (code.seen % 60, code.skipped) == (0, 0)  # whole epochs, read ahead
    assert code.seen > 0
    assert 0.3 < code.epochs <= 1


def test_epochs_count_the_rows_that_were_delivered(corpus: Path) -> None:
    datamodule = small_datamodule(corpus, sources={"code": Source(kind="files", path=str(corpus / "code"))})
    datamodule.trainer = fake_trainer()
    rows, epochs = [], []
    for batch in islice(datamodule.train_dataloader(), 600):
        datamodule.on_before_batch_transfer(batch, 0)
        code = datamodule.source_statistics()["code"]
        rows.append(code.rows)
        epochs.append(code.epochs)
    pass_rows = rows[epochs.index(next(epoch for epoch in epochs if epoch >= 1))]  # a window holds all of the source
    assert all(epoch == pytest.approx(row / pass_rows, abs=0.02) for row, epoch in zip(rows, epochs, strict=True))
    assert epochs[-1] > 2


def test_packing_is_a_choice(corpus: Path) -> None:
    datamodule = small_datamodule(corpus, packing="best_fit", seq_len=300)
    batches = train(datamodule, 20)
    padding = sum(int((batch["labels"] == -100).sum()) for batch in batches)
    assert 0 < padding < 0.5 * 20 * 2 * 300
    code = datamodule.source_statistics()["code"]
    assert 0.5 * 300 * code.rows < code.tokens < 300 * code.rows


def test_iterating_leaves_the_global_generator_alone(corpus: Path) -> None:
    state = torch.get_rng_state()
    train(small_datamodule(corpus), 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_change_no_batch(corpus: Path) -> None:
    alone = train(small_datamodule(corpus, num_lanes=4), 12)
    assert same(train(small_datamodule(corpus, num_lanes=4, num_workers=2), 12), alone)
    assert not same(train(small_datamodule(corpus, num_lanes=4, seed=1), 12), alone)


def test_ranks_share_what_one_process_trains_on(corpus: Path) -> None:
    alone = train(small_datamodule(corpus, num_lanes=4), 20)
    ranks = [train(small_datamodule(corpus, num_lanes=4), 10, num_replicas=2, rank=rank) for rank in (0, 1)]
    assert same([batch for pair in zip(*ranks, strict=True) for batch in pair], alone)


def test_training_has_all_documents_but_the_held_out_ones(corpus: Path) -> None:
    sources = {"code": Source(kind="files", path=str(corpus / "code"))}
    datamodule = small_datamodule(corpus, sources=sources, num_lanes=4, seq_len=600, packing="best_fit")
    seen = Counter[str]()
    for batch in train(datamodule, 60):
        for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
            for start in (positions == 0).nonzero().flatten().tolist():
                seen[" ".join(datamodule.tokenizer.decode(ids[start : start + 40].tolist()).split(" ")[:4])] += 1
    texts = [path.read_text() for path in (corpus / "code").iterdir()]
    assert all(seen[" ".join(text.split(" ")[:4])] > 3 for text in texts if not _held_out(text))
    assert all(seen[" ".join(text.split(" ")[:4])] == 0 for text in texts if _held_out(text))


def _held_out(text: str) -> bool:
    return Document("", text, origin=text).is_held_out(share=0.2)


# Within a block, in a later block, in the second epoch and beyond.
@pytest.mark.parametrize(("at", "workers"), [(1, 0), (7, 2), (60, 0), (333, 2)])
def test_resuming_continues_exactly(corpus: Path, at: int, workers: int) -> None:
    datamodule = small_datamodule(corpus, num_lanes=2, shuffle_megabytes=0.005)
    whole = train(datamodule, at + 12)
    first = small_datamodule(corpus, num_lanes=2, num_workers=workers, shuffle_megabytes=0.005)
    assert same(train(first, at), whole[:at])
    assert at < 333 or first.source_statistics()["code"].epochs >= 1
    state = first.state_dict()
    again = resumed(corpus, state, step=at, num_workers=workers, shuffle_megabytes=0.005)
    assert same(train(again, 12, step=at), whole[at:])
    train(first, 12, step=at)
    assert again.source_statistics() == first.source_statistics()
    assert again.source_statistics() == datamodule.source_statistics()


def test_resuming_on_other_ranks_and_workers_is_exact_where_lanes_allow(corpus: Path) -> None:
    def ranks(datamodules: list[TextCodeDataModule], count: int, **trainer: Any) -> Batches:
        parts = [train(part, count, num_replicas=2, rank=rank, **trainer) for rank, part in enumerate(datamodules)]
        return [batch for pair in zip(*parts, strict=True) for batch in pair]

    one = small_datamodule(corpus, num_lanes=4)
    whole = train(one, 40, accumulate=2)
    first = small_datamodule(corpus, num_lanes=4)
    train(first, 16, accumulate=2)
    state = first.state_dict()
    pair = [resumed(corpus, state, step=8, num_workers=2, trainer={"num_replicas": 2, "rank": rank}) for rank in (0, 1)]
    assert same(ranks(pair, 12, step=8), whole[16:])


def test_lanes_that_do_not_fit_ranks_and_workers_are_refused_with_the_numbers(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="num_workers: got 3, allowed a divisor of 2: each of 2 ranks has 2 of the 4"):
        train(small_datamodule(corpus, num_lanes=4, num_workers=3), 1, num_replicas=2)
    with pytest.raises(ConfigError, match="num_lanes: got 4, allowed a multiple of 3, the number of ranks"):
        train(small_datamodule(corpus, num_lanes=4), 1, num_replicas=3)
    state = saved(corpus)  # of one lane
    with pytest.raises(ConfigError, match="num_workers: got 2, allowed a divisor of 1"):
        resumed(corpus, state, step=1, num_workers=2)


def test_an_interrupted_step_is_repeated_from_its_first_batch(corpus: Path) -> None:
    whole = train(small_datamodule(corpus), 12, accumulate=3)
    stopped = small_datamodule(corpus)
    train(stopped, 8, accumulate=3)  # two steps, and two of the three batches of the third
    state = stopped.state_dict()
    assert state["global_batches"] == 6
    again = resumed(corpus, state, step=2, trainer={"accumulate": 3})
    assert same(train(again, 6, step=2, accumulate=3), whole[6:])


def test_batches_that_were_prepared_but_not_trained_on_come_again(corpus: Path) -> None:
    whole = train(small_datamodule(corpus), 9)
    datamodule = small_datamodule(corpus, num_workers=1)
    datamodule.trainer = fake_trainer()
    ahead = iter(datamodule.train_dataloader())
    batches = [datamodule.on_before_batch_transfer(next(ahead), 0) for _ in range(4)]
    next(ahead)  # fetched by Lightning, never trained on
    assert same(batches + train(datamodule, 5), whole)


def test_validation_rows_are_limited_ordered_and_divided_equally(corpus: Path) -> None:
    datamodule = small_datamodule(corpus, validation_rows=5, batch_size=3)
    datamodule.setup("validate")
    rows = torch.cat([batch["source"] for batch in datamodule.val_dataloader()])
    assert rows.tolist() == [0, 1] * 5
    everything = torch.cat([batch["input_ids"] for batch in datamodule.val_dataloader()])
    parts = []
    for rank in range(3):
        datamodule.trainer = fake_trainer(rank=rank, num_replicas=3)
        parts.append(torch.cat([batch["input_ids"] for batch in datamodule.val_dataloader()]))
    assert [len(part) for part in parts] == [3, 3, 3]
    assert torch.equal(torch.cat(parts), everything[:9])
    for loader in (datamodule.test_dataloader(), datamodule.predict_dataloader()):
        assert torch.equal(torch.cat([batch["input_ids"] for batch in loader]), parts[-1])


def test_validation_is_the_same_on_any_number_of_lanes(corpus: Path) -> None:
    one, many = small_datamodule(corpus, num_lanes=1), small_datamodule(corpus, num_lanes=8, seed=5)
    assert same(list(one.val_dataloader()), list(many.val_dataloader()))


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
    assert all(_held_out(texts[file]) for files in found for file in files)


def test_short_documents_give_shorter_prompts_after_the_long_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_files(tmp_path / "short", count=30, seed=0, words=30)
    datamodule = small_datamodule(tmp_path, sources={"short": Source(kind="files", path=str(folder))})
    lengths = [len(prompt) for prompt in datamodule.validation_prompts(1000, 90)]
    assert all(left >= right >= 1 for left, right in pairwise(lengths))
    assert lengths[-1] < 90
    assert "1000 prompts asked for" in caplog.text


def test_bad_files_beyond_the_share_are_refused_before_training(tmp_path: Path) -> None:
    sources = by_name(two_sources(tmp_path, count=10))
    for index in range(3):
        (tmp_path / "text" / f"bad{index}.txt").write_bytes(b"\xff\xfe broken")
    with pytest.raises(DataError, match=r"'text': 3 of 13 records are bad, more than max_bad_share 0.05[^$]*bad\d.txt"):
        small_datamodule(tmp_path, sources=sources).prepare_data()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_stream_arrives_as_it_is(tmp_path: Path, workers: int) -> None:
    sources = by_name(two_sources(tmp_path, count=10))
    datamodule = small_datamodule(tmp_path, sources=sources, num_workers=workers)
    datamodule.prepare_data()
    datamodule._readers(1)  # files are listed, and then they vanish
    for file in (tmp_path / "text").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"'text': .*") as caught:
        train(datamodule, 50)
    assert "Traceback" not in str(caught.value)


def saved(corpus: Path, **trainer: Any) -> dict[str, Any]:
    datamodule = small_datamodule(corpus)
    train(datamodule, 2, **trainer)
    return datamodule.state_dict()


def test_the_saved_state_is_plain_and_small(corpus: Path) -> None:
    state = saved(corpus)
    assert json.loads(json.dumps(state)) == state
    assert len(json.dumps(state)) < 2000


@pytest.mark.parametrize(
    ("settings", "trainer", "field"),
    [
        ({"seed": 1}, {}, "seed"),
        ({"batch_size": 3}, {}, "batch_size"),
        ({"seq_len": 17}, {}, "seq_len"),
        ({"packing": "best_fit"}, {}, "packing"),
        ({"shuffle_megabytes": 1.0}, {}, "shuffle_megabytes"),
        ({"num_lanes": 2}, {}, "num_lanes"),
        ({}, {"accumulate": 2}, "trainer.accumulate_grad_batches times devices"),
        ({}, {"num_replicas": 2}, "num_lanes"),
    ],
)
def test_resuming_in_another_order_is_refused_in_fit_only(
    corpus: Path, settings: dict[str, Any], trainer: dict[str, int], field: str
) -> None:
    state = saved(corpus)
    datamodule = small_datamodule(corpus, **settings)
    for stage in (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING):
        datamodule.trainer = fake_trainer(**trainer, fn=stage)
        datamodule.load_state_dict(state)
    datamodule.trainer = fake_trainer(**trainer)
    with pytest.raises(ConfigError) as caught:
        datamodule.load_state_dict(state)
    assert caught.value.field == field


def test_other_weights_or_files_are_another_order(corpus: Path, tmp_path: Path) -> None:
    state = saved(corpus)
    with pytest.raises(ConfigError, match="sources"):
        resumed(corpus, state | {"sources": "code=1.0, text=1.0"}, step=2)
    sources = by_name(two_sources(tmp_path))
    datamodule = small_datamodule(tmp_path, sources=sources)
    train(datamodule, 2)
    state = datamodule.state_dict()
    write_files(tmp_path / "code", count=1, seed=77)
    with pytest.raises(ConfigError, match="files of source code: got"):
        resumed(tmp_path, state, step=2, sources=sources)


def test_documents_begin_and_end_as_the_tokenizer_says_and_resume_so(corpus: Path, tmp_path: Path) -> None:
    llama(add_eos_token=True).save_pretrained(tmp_path)
    settings = {"tokenizer": str(tmp_path), "seq_len": 64}
    datamodule = small_datamodule(corpus, **settings)
    batches = train(datamodule, 40)
    bos, eos = datamodule.tokenizer.bos_token_id, datamodule.tokenizer.eos_token_id
    following = [after for batch in batches for row in batch["input_ids"].tolist() for before, after in pairwise(row)
                 if before == eos]  # fmt: skip
    assert following
    assert set(following) == {bos}
    assert [prompt[0] for prompt in datamodule.validation_prompts(3, 8)] == [bos] * 3
    state = datamodule.state_dict()
    assert same(train(resumed(corpus, state, step=40, **settings), 3, step=40), train(datamodule, 3, step=40))
    del state["beginning of documents"]  # as written where documents began otherwise
    with pytest.raises(ConfigError, match="beginning of documents: got"):
        resumed(corpus, state, step=40, **settings)


def test_a_state_that_a_fit_may_go_on_from_is_checked_once(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, asked, order = saved(corpus), list[str](), TextCodeDataModule._order
    monkeypatch.setattr(TextCodeDataModule, "_order", lambda self: asked.append("order") or order(self))  # type: ignore[func-returns-value]
    datamodule = small_datamodule(corpus)
    datamodule.trainer = fake_trainer()
    datamodule.check_state_dict(state)  # by the module, before anything is taken
    datamodule.load_state_dict(state)  # by Lightning
    assert asked == ["order"]
    datamodule.load_state_dict(dict(state))
    assert asked == ["order"] * 2


def test_a_model_is_never_fed_the_ids_of_another_tokenizer(corpus: Path, tmp_path: Path) -> None:
    trained = small_datamodule(corpus)
    train(trained, 2)
    other = small_datamodule(corpus, vocab_size=299)
    for stage in TrainerFn:
        other.trainer = fake_trainer(fn=stage)
        with pytest.raises(ConfigError, match=r"tokenizer: got .*allowed .*the checkpoint's own.*layerskip export"):
            other.load_state_dict(trained.state_dict())
    trained.tokenizer.save_pretrained(tmp_path / "tokenizer")
    kept = small_datamodule(corpus, tokenizer=str(tmp_path / "tokenizer"))
    kept.trainer = fake_trainer(fn=TrainerFn.VALIDATING)
    kept.load_state_dict(trained.state_dict())


def test_a_trainer_that_would_divide_batches_again_is_refused(corpus: Path) -> None:
    datamodule = small_datamodule(corpus)
    datamodule.trainer = fake_trainer(num_replicas=2, use_distributed_sampler=True)
    with pytest.raises(ConfigError, match="use_distributed_sampler"):
        datamodule.setup("fit")
    datamodule.trainer = fake_trainer(use_distributed_sampler=True)  # one device: nothing to divide
    datamodule.setup("fit")
    datamodule.trainer = fake_trainer(overfit_batches=1)
    with pytest.raises(ConfigError, match="overfit_batches"):
        datamodule.setup("fit")


def test_a_trainer_that_would_never_end_or_never_validate_is_refused(corpus: Path) -> None:
    datamodule = small_datamodule(corpus)
    for settings, field in (({"max_steps": -1}, "trainer.max_steps"), ({"val": 1.0}, "trainer.val_check_interval")):
        datamodule.trainer = fake_trainer(**settings)  # type: ignore[arg-type]
        with pytest.raises(ConfigError) as caught:
            datamodule.setup("fit")
        assert caught.value.field == field
        datamodule.setup("validate")
        datamodule.trainer = fake_trainer(**settings, limit=10)  # type: ignore[arg-type]  # an epoch of ten batches
        datamodule.setup("fit")
