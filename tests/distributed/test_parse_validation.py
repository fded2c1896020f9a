"""Ranks decode different utterances and agree on one result, which is that of one process.

How ranks decode together, whatever the strategy, is tested in test_validation_decoding.py.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

import callbacks.parse_validation as callback_module
from app.decoding.engine import decode_batch
from app.decoding.settings import DecodingSettings
from app.protocols import GenerationExample
from app.topv2.evaluation import evaluate_parses
from callbacks import ParseValidation
from tests.support.processes import run_ranks
from tests.support.runs import make_module, make_trainer
from tests.support.tiny_models import tiny_config

EXAMPLES = 5
TIMES = ("ms_per_token", "speedup")


def answer(tokens):
    return f"[IN:A {' '.join(map(str, tokens))} ]"


class Utterances(LightningDataModule):
    """Examples 0, 1 and 4 are what the untrained model says; the others are not."""

    tokenizer = SimpleNamespace(eos_token_id=299)
    target_format = "parse"

    def __init__(self):
        super().__init__()
        module = new_module()
        module.configure_model()
        prompts = [[7 * row + idx for idx in range(3 + row)] for row in range(EXAMPLES)]
        settings = DecodingSettings(max_new_tokens=4, eos_token_ids=(299,))
        said = decode_batch(module.eval().exitable_decoder(), prompts, strategy="autoregressive", settings=settings)
        self.examples = [
            GenerationExample(prompt, "[IN:A ]" if row in (2, 3) else answer(result.tokens), "ab"[row % 2])
            for row, (prompt, result) in enumerate(zip(prompts, said, strict=True))
        ]

    def generation_examples(self, stage, count):
        return self.examples[:count]

    def answer(self, tokens):
        return answer(tokens)

    def val_dataloader(self):
        tokens = torch.arange(24).view(2, 12)
        rows = {"input_ids": tokens, "labels": tokens.roll(-1, 1), "position_ids": torch.arange(12).expand(2, 12)}
        rows["source"] = torch.zeros(2, dtype=torch.int64)
        return DataLoader([{name: column[row] for name, column in rows.items()} for row in range(2)], batch_size=1)


def new_module():
    return make_module(config=tiny_config(num_layers=4, vocab_size=300, max_length=128, tied=False))


def validate(root, data, num_examples=EXAMPLES, **settings):
    """Scalars, what this rank decoded, and the title of the table."""
    own = []

    def spy(decoder, examples, speed_examples, **settings):
        own.append((examples, speed_examples))
        return evaluate_parses(decoder, examples, speed_examples, **settings)

    callback_module.evaluate_parses = spy  # in this process alone, where it is one of two
    callback = ParseValidation(
        exit_layers=[1, 3],
        num_draft_tokens=[2],
        num_examples=num_examples,
        num_speed_examples=3,
        batch_size=2,
        max_new_tokens=4,
    )
    trainer = make_trainer(root, max_steps=1, callbacks=[callback], limit_val_batches=1.0, **settings)
    trainer.validate(new_module(), datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "parse/" in name}
    return {"own": own[0], "metrics": metrics, "title": callback.report().title}


def on_ranks(root, data):
    def on_two(folder, **settings):
        return validate(folder, data, devices=2, strategy=DDPStrategy(process_group_backend="gloo"), **settings)

    return on_two(root), on_two(root / "one", num_examples=1)


def untimed(records):
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def records(root):
    return json.loads((root / "parse_validate.json").read_text())["results"]


@pytest.fixture(scope="module")
def data():
    return Utterances()


@pytest.fixture(scope="module")
def ranks(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    return *run_ranks(on_ranks, root, data), root


@pytest.mark.distributed
def test_ranks_decode_different_examples_and_agree(ranks, data):
    (first, _), (second, _), *_ = ranks
    assert [list(first["own"][0]), list(second["own"][0])] == [data.examples[0::2], data.examples[1::2]]
    assert [list(first["own"][1]), list(second["own"][1])] == [data.examples[0:3:2], data.examples[1:3:2]]
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["parse/exact_match/exit_04"] == pytest.approx(3 / 5)
    assert first["title"].endswith("on 2 ranks")


@pytest.mark.distributed
def test_ranks_together_find_what_one_process_finds(ranks, data, tmp_path, monkeypatch):
    monkeypatch.setattr(callback_module, "evaluate_parses", evaluate_parses)
    validate(tmp_path, data)
    alone, together = untimed(records(tmp_path)), untimed(records(ranks[-1]))
    assert together == alone
    assert (alone[0]["exact_match"], alone[0]["num_examples"]) == (3 / 5, 5)
    assert alone[0]["by_group"]["a"]["num_examples"] == 3
    validate(tmp_path, data, num_examples=4)
    assert untimed(records(tmp_path)) != together


@pytest.mark.distributed
def test_a_rank_without_examples_waits_for_the_others(ranks):
    (_, first), (_, second), root = ranks
    assert [len(first["own"][0]), len(second["own"][0])] == [1, 0]
    assert first["metrics"] == second["metrics"]
    assert records(root / "one")[0]["num_examples"] == 1
