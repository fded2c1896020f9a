from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from app.errors import ConfigError, DataError
from app.protocols import CorpusOwner, ExampleOwner, PromptOwner
from datamodules import TOPv2DataModule
from tests.support.topv2_folders import DOMAINS, rows_of, small_topv2
from tests.unit.datamodules.corpora import Batches, fake_trainer, same

NUM_TRAIN, NUM_HELD_OUT = 90 + 87, 20 + 17


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and its cache, built once."""
    folder = tmp_path_factory.mktemp("topv2")
    small_topv2(folder).prepare_data()
    return folder


def batches(datamodule: TOPv2DataModule, **trainer: Any) -> Batches:
    datamodule.trainer = fake_trainer(**trainer)
    datamodule.setup("fit")
    return list(datamodule.train_dataloader())


def targets(datamodule: TOPv2DataModule, loader: DataLoader[Any] | Batches) -> list[str]:
    """The text of every row's labels."""
    return [datamodule.answer(row[row >= 0].tolist()) for batch in loader for row in batch["labels"]]


def parses(split: int, *, count: int) -> list[str]:
    """Of both domains, as the folder has them."""
    return [
        parse
        for number, domain in enumerate(DOMAINS)
        for _, _, parse in rows_of(domain, count=count - 3 * number, seed=10 * number + split)
    ]


def test_it_is_what_module_and_callbacks_ask_for(root: Path) -> None:
    datamodule = small_topv2(root)
    for protocol in (CorpusOwner, PromptOwner, ExampleOwner):
        assert isinstance(datamodule, protocol)
    assert datamodule.vocab_size == len(datamodule.tokenizer) == 330  # before setup, as a linked argument needs it
    assert datamodule.source_names == DOMAINS
    assert datamodule.seq_len == 128
    assert datamodule.target_format == "parse"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("domains", []),
        ("domains", ["weather", "weather"]),
        ("domains", ["weather", "traffic"]),
        ("spis", 11),
        ("prompt_template", "no place for it"),
        ("prompt_template", "{utterance} {utterance}"),
        ("target_format", "xml"),
        ("length_multiple", 0),
        ("max_bad_share", float("nan")),  # the settings of rows are tested with TextCodeDataModule
    ],
)
def test_a_setting_out_of_range_is_named(root: Path, field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        small_topv2(root, **{field: value})
    assert caught.value.field == field


def test_only_two_domains_have_low_resource_splits(root: Path) -> None:
    with pytest.raises(
        ConfigError, match="allowed each once, of reminder, weather; only these have low-resource splits"
    ):
        small_topv2(root, domains=["alarm", "weather"], spis=10)
    assert small_topv2(root, domains=None, spis=10).source_names == ("reminder", "weather")
    assert len(small_topv2(root, domains=None).source_names) == 8
    assert Counter(targets(small_topv2(root, spis=10), batches(small_topv2(root, spis=10)))).total() == 24


def test_a_vocab_size_without_effect_warns(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    small_topv2(root, tokenizer="somewhere", vocab_size=2048)  # the default: nothing was asked for
    assert not caplog.records
    small_topv2(root, tokenizer="somewhere")
    assert "vocab_size has no effect: the tokenizer in somewhere is used" in caplog.text


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("target_format", ["parse", "json"])
def test_an_epoch_is_every_training_target_once(root: Path, packed: bool, target_format: str) -> None:
    datamodule = small_topv2(root, packed=packed, target_format=target_format, seq_len=256)
    loaded = batches(datamodule)
    examples = datamodule._store.examples["train"]
    assert sum(int((batch["labels"] >= 0).sum()) for batch in loaded) == len(examples.tokens) - sum(
        examples.prompt_lengths
    )
    if packed:
        assert sum(len(batch["labels"]) for batch in loaded) < NUM_TRAIN / 3
    else:
        assert Counter(targets(datamodule, loaded)) == Counter(examples.references)
        if target_format == "parse":
            assert Counter(examples.references) == Counter(parses(0, count=90))


def test_rows_of_a_packed_batch_are_of_one_domain(root: Path) -> None:
    datamodule = small_topv2(root, packed=True, seq_len=256)
    for batch in batches(datamodule):
        for ids, source in zip(batch["input_ids"], batch["source"].tolist(), strict=True):
            text = datamodule.tokenizer.decode(ids)
            other = {"reminder": "GET_WEATHER", "weather": "CREATE_REMINDER"}[DOMAINS[source]]
            assert DOMAINS[source].upper() in text
            assert other not in text


def test_the_source_is_the_domain(root: Path) -> None:
    for domains in (DOMAINS, DOMAINS[::-1]):
        datamodule = small_topv2(root, domains=list(domains))
        for batch in batches(datamodule):
            names = [domains[source] for source in batch["source"].tolist()]
            assert all(name.upper() in text for name, text in zip(names, targets(datamodule, [batch]), strict=True))


def test_rows_longer_than_the_limit_are_skipped_and_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    lengths = small_topv2(root)._store.examples["train"].lengths
    limit = int(sorted(lengths)[len(lengths) // 2])
    datamodule = small_topv2(root, seq_len=limit)
    expected = int((lengths <= limit).sum())
    loaded = batches(datamodule)
    assert sum(len(batch["labels"]) for batch in loaded) == expected
    assert max(int((batch["labels"] >= 0).nonzero()[:, 1].max()) for batch in loaded) == limit - 1
    assert f"{NUM_TRAIN - expected} of {NUM_TRAIN} train rows skipped: longer than seq_len {limit}" in caplog.text
    with pytest.raises(DataError, match="no train row has at most 3 tokens"):
        batches(small_topv2(root, seq_len=3))


def test_workers_change_no_batch(root: Path) -> None:
    alone = batches(small_topv2(root))
    assert same(batches(small_topv2(root, num_workers=2)), alone)
    assert not same(batches(small_topv2(root, seed=1)), alone)


def test_iterating_leaves_the_global_generator_alone(root: Path) -> None:
    state = torch.get_rng_state()
    batches(small_topv2(root))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("num_replicas", "accumulate"), [(4, 1), (2, 2), (1, 4)])
def test_micro_batches_are_the_same_however_a_step_is_spread_and_where_a_run_goes_on(
    root: Path, num_replicas: int, accumulate: int
) -> None:
    whole = batches(small_topv2(root, batch_size=2), accumulate=4)
    assert {len(batch["labels"]) for batch in whole} == {1, 2}  # of 177 rows
    for step in (0, 3):
        ranks = [
            batches(
                small_topv2(root, batch_size=2), num_replicas=num_replicas, rank=rank, accumulate=accumulate, step=step
            )
            for rank in range(num_replicas)
        ]
        assert same([batch for of_ranks in zip(*ranks, strict=True) for batch in of_ranks], whole[4 * step :])


def test_a_rank_without_a_row_in_a_step_gets_one_without_targets(root: Path) -> None:
    ranks = [
        batches(small_topv2(root, batch_size=1, domains=["weather"], spis=10), num_replicas=8, rank=rank)
        for rank in range(8)
    ]
    steps = [[int((batch["labels"] >= 0).any()) for batch in step] for step in zip(*ranks, strict=True)]
    assert [sum(step) for step in steps] == [6, 6]
    assert all(len(batch["labels"]) == 1 for rank in ranks for batch in rank)


@pytest.mark.parametrize(("stage", "split"), [("val", 1), ("test", 2), ("predict", 2)])
def test_held_out_rows_are_some_of_each_domain_sorted_by_length_and_divided_equally(
    root: Path, stage: str, split: int
) -> None:
    datamodule = small_topv2(root, validation_rows=9, batch_size=4)
    whole = list(getattr(datamodule, f"{stage}_dataloader")())
    assert Counter(torch.cat([batch["source"] for batch in whole]).tolist()) == {0: 9, 1: 9}
    assert Counter(targets(datamodule, whole)) <= Counter(parses(split, count=20))
    lengths = [int((row >= 0).nonzero().max()) for batch in whole for row in batch["labels"]]
    assert lengths == sorted(lengths)
    parts: Batches = []
    for rank in range(4):
        datamodule.trainer = fake_trainer(rank=rank, num_replicas=4)
        part = list(getattr(datamodule, f"{stage}_dataloader")())
        assert sum(len(batch["labels"]) for batch in part) == 18 // 4
        parts += part
    assert Counter(targets(datamodule, parts)) <= Counter(targets(datamodule, whole))
    datamodule.trainer = fake_trainer(rank=0, num_replicas=100)
    with pytest.raises(DataError, match=r"held-out rows \(18\) are fewer than devices \(100\); raise validation_rows"):
        getattr(datamodule, f"{stage}_dataloader")()


def test_held_out_rows_are_the_same_for_every_seed_and_batch_size(root: Path) -> None:
    one, two = small_topv2(root, validation_rows=5), small_topv2(root, validation_rows=5, seed=1, batch_size=3)
    assert targets(one, one.val_dataloader()) == targets(two, two.val_dataloader())
    assert targets(one, one.val_dataloader()) != targets(one, one.test_dataloader())


def test_prompts_are_whole_and_no_longer_than_asked(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    datamodule = small_topv2(root)
    prompts = datamodule.validation_prompts(6, 64)
    assert prompts == datamodule.validation_prompts(6, 64) == small_topv2(root, seed=9).validation_prompts(6, 64)
    utterances = {
        utterance
        for number, domain in enumerate(DOMAINS)
        for _, utterance, _ in rows_of(domain, count=20 - 3 * number, seed=10 * number + 1)
    }
    for prompt in prompts:
        assert datamodule.tokenizer.decode(prompt).removesuffix(" =>") in utterances
    assert len(prompts) == 6
    assert not caplog.records
    shortest = min(len(prompt) for prompt in datamodule.validation_prompts(NUM_HELD_OUT, 64))
    assert all(len(prompt) == shortest for prompt in datamodule.validation_prompts(NUM_HELD_OUT, shortest))
    assert "37 prompts asked for" in caplog.text
    with pytest.raises(DataError, match=f"no prompt of at most {shortest - 1} tokens; the shortest has {shortest}"):
        datamodule.validation_prompts(1, shortest - 1)


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize(("stage", "split"), [("validate", "eval"), ("test", "test")])
def test_a_generation_example_is_the_training_prompt_and_the_answer_to_it(
    root: Path, stage: str, split: Any, special_tokens: bool
) -> None:
    datamodule = small_topv2(root, special_tokens=special_tokens, seq_len=30)
    chosen = datamodule.generation_examples(stage, 1000)
    assert len(chosen) == NUM_HELD_OUT  # also what is too long to train on
    assert datamodule.generation_examples(stage, 7) == chosen[:7]
    assert len({example.group for example in chosen[:7]}) == 2  # shuffled
    examples = datamodule._store.examples[split]
    by_prompt = {tuple(examples.prompt(index)): examples.example(index).tolist() for index in range(len(chosen))}
    for example in chosen:
        target = by_prompt[tuple(example.prompt)][len(example.prompt) :]
        assert datamodule.answer(target) == datamodule.answer(target[:-1]) == example.reference
        assert datamodule.answer([*target, *target]) == example.reference  # nothing after the end counts
        assert example.group.upper() in example.reference
    with pytest.raises(ConfigError, match=r"stage: got 'fit', allowed validate \| test"):
        datamodule.generation_examples("fit", 1)


def test_an_empty_answer_is_an_empty_text(root: Path) -> None:
    datamodule = small_topv2(root)
    assert datamodule.answer([]) == datamodule.answer([datamodule.tokenizer.eos_token_id]) == ""


@pytest.mark.parametrize(
    ("change", "trainer", "field"),
    [
        ({"seed": 1}, {}, "seed"),
        ({"batch_size": 4}, {}, "batch_size"),
        ({"seq_len": 60}, {}, "seq_len"),
        ({"packed": True}, {}, "packed"),
        ({"special_tokens": True}, {}, "corpus"),
        ({"domains": ["weather"]}, {}, "domains"),
        ({}, {"accumulate": 4}, "trainer.accumulate_grad_batches times devices"),
        ({}, {"num_replicas": 2, "accumulate": 2}, "trainer.accumulate_grad_batches times devices"),
    ],
)
def test_resuming_with_another_order_is_refused_in_fit_alone(
    root: Path, change: dict[str, Any], trainer: dict[str, Any], field: str
) -> None:
    datamodule = small_topv2(root)
    datamodule.trainer = fake_trainer(accumulate=2)
    state = datamodule.state_dict()
    for alike in ({"accumulate": 2}, {"num_replicas": 2}):  # as many micro-batches a step
        datamodule.trainer = fake_trainer(**alike)
        datamodule.load_state_dict(state)
    other = small_topv2(root, **change)
    other.trainer = fake_trainer(**trainer or {"accumulate": 2})
    with pytest.raises(ConfigError, match="as in the checkpoint") as caught:
        other.load_state_dict(state)
    assert caught.value.field == field
    other.trainer = fake_trainer(**trainer, fn=TrainerFn.VALIDATING)
    if set(change) & {"special_tokens", "domains"}:  # another tokenizer was trained
        with pytest.raises(ConfigError, match="the checkpoint's own"):
            other.load_state_dict(state)
    else:
        other.load_state_dict(state)


@pytest.mark.parametrize("missing", ["batches_per_step", "filling of rows"])
def test_a_checkpoint_of_an_earlier_version_is_refused_as_one(root: Path, missing: str) -> None:
    datamodule = small_topv2(root, packed=True, seq_len=64)
    datamodule.trainer = fake_trainer(num_replicas=2)
    state = datamodule.state_dict()
    datamodule.load_state_dict(dict(state))  # the negative control
    del state[missing]
    with pytest.raises(ConfigError, match=r"allowed .* an earlier version wrote it, .*; start a new run from the w"):
        datamodule.load_state_dict(state)


@pytest.mark.parametrize(
    ("trainer", "field"),
    [
        ({"num_replicas": 2, "use_distributed_sampler": True}, "trainer.use_distributed_sampler"),
        ({"overfit_batches": 2.0}, "trainer.overfit_batches"),
    ],
)
def test_a_trainer_that_would_move_batches_is_refused(root: Path, trainer: dict[str, Any], field: str) -> None:
    datamodule = small_topv2(root)
    datamodule.trainer = fake_trainer(**trainer)
    with pytest.raises(ConfigError) as caught:
        datamodule.setup("fit")
    assert caught.value.field == field
