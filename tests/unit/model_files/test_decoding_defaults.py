import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from app.errors import CheckpointError, ConfigError
from app.model_files.decoding_defaults import (
    Conditions,
    DecodingDefaults,
    read_decoding_defaults,
    write_decoding_defaults,
)
from tests.support.tiny_models import tiny_llama

_DRAFTING = DecodingDefaults(
    strategy="self_speculative",
    exit_layer=2,
    num_draft_tokens=3,
    head=1.5,
    draft_head=1.25,
    first_extra=0.2,
    extra_token=0.04,
    overhead=0.0,
    measured_speedup=1.7,
    conditions=Conditions(dtype="bfloat16", device_type="cpu", threads=2),
)
_STORED = {"strategy": "self_speculative", "exit_layer": 1, "num_draft_tokens": 1}
_HERE = {"dtype": "float32", "device_type": "cpu"}
_N_GRAM = DecodingDefaults(strategy="n_gram", n_gram_match=3, measured_speedup=1.2)
_PLAIN = DecodingDefaults(strategy="autoregressive", head=1.5, extra_token=0.04, overhead=0.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_llama(num_layers=4, tied=False, eos_token_id=7).save_pretrained(directory)
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _content(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "generation_config.json").read_text())


def _edit(directory: Path, **fields: Any) -> None:
    (directory / "generation_config.json").write_text(json.dumps(_content(directory) | fields))


def _load(directory: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    "defaults",
    [
        _DRAFTING,
        replace(_DRAFTING, n_gram_match=2, n_gram_max_drafts=5, draft_vocabulary_size=9),
        replace(_DRAFTING, draft_policy="dynamic", draft_exits=(1, 3)),
        _N_GRAM,
        _PLAIN,
    ],
    ids=["exit", "both", "exits", "n-grams", "plain"],
)
def test_what_is_written_is_read_back_from_the_loaded_model_and_from_what_that_saves(
    directory: Path, tmp_path: Path, defaults: DecodingDefaults
) -> None:
    assert read_decoding_defaults(_load(directory)) is None
    assert write_decoding_defaults(directory, defaults) == directory / "generation_config.json"
    model = _load(directory)
    assert read_decoding_defaults(model) == defaults
    model.save_pretrained(tmp_path / "again")
    assert read_decoding_defaults(_load(tmp_path / "again")) == defaults


def test_every_other_field_stays_and_no_file_is_left_over(directory: Path) -> None:
    _edit(directory, max_length=123, house="brick", num_assistant_tokens=9)
    names, before = {file.name for file in directory.iterdir()}, _content(directory)
    write_decoding_defaults(directory, _PLAIN)
    after = _content(directory)
    assert after.pop("layerskip")["strategy"] == "autoregressive"
    assert before.pop("_from_model_config") is True
    assert after == before
    assert {file.name for file in directory.iterdir()} == names


def test_transformers_generates_the_same_tokens_and_drafts_from_the_exit(directory: Path) -> None:
    prompt = torch.arange(20, 28)[None]
    limits = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = _load(directory).generate(prompt, **limits)
    write_decoding_defaults(directory, _DRAFTING)
    model, depths = _load(directory), []
    model.lm_head.register_forward_pre_hook(lambda *_: depths.append(model.config.num_hidden_layers))
    assert torch.equal(model.generate(prompt, **limits), expected)
    assert depths[:4] == [2, 2, 2, 4]
    depths.clear()
    write_decoding_defaults(directory, _PLAIN)
    model = _load(directory)
    model.lm_head.register_forward_pre_hook(lambda *_: depths.append(model.config.num_hidden_layers))
    assert torch.equal(model.generate(prompt, **limits), expected)
    assert set(depths) == {4}
    assert not {"assistant_early_exit", "num_assistant_tokens", "num_assistant_tokens_schedule"} & set(
        _content(directory)
    )


def test_without_the_file_what_config_json_implies_is_kept(directory: Path) -> None:
    (directory / "generation_config.json").unlink()
    write_decoding_defaults(directory, _DRAFTING)
    assert _load(directory).generation_config.eos_token_id == 7
    assert read_decoding_defaults(_load(directory)) == _DRAFTING


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_damaged_file_is_refused_and_left_as_it_is(directory: Path, content: str) -> None:
    file = directory / "generation_config.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        write_decoding_defaults(directory, _DRAFTING)
    assert file.read_text() == content


def test_a_failed_write_leaves_the_old_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _content(directory)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("app.whole_file.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_decoding_defaults(directory, _DRAFTING)
    assert _content(directory) == before
    assert not list(directory.glob(".*"))


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ("fast", "layerskip: got 'fast'"),
        ({}, "layerskip: got {}"),
        ({"strategy": "beam"}, "layerskip.strategy: got 'beam'"),
        ({"strategy": "self_speculative"}, "layerskip.exit_layer: got None"),
        ({"strategy": "self_speculative", "exit_layer": 4, "num_draft_tokens": 1}, r"layerskip.exit_layer: got 4"),
        ({"strategy": "self_speculative", "exit_layer": True, "num_draft_tokens": 1}, "layerskip.exit_layer: got True"),
        ({"strategy": "self_speculative", "exit_layer": 1, "num_draft_tokens": 0}, "num_draft_tokens: got 0"),
        ({"strategy": "autoregressive", "exit_layer": 1}, "layerskip.exit_layer: got 1"),
        ({"strategy": "autoregressive", "n_gram_match": 1}, "n_gram_match: got 1, allowed null, with"),
        (_STORED | {"n_gram_max_drafts": 0}, "n_gram_max_drafts: got 0, allowed an integer, at least 1 or null, with"),
        ({"strategy": "n_gram"}, "n_gram_match: got None, allowed an integer, at least 1, with"),
        ({"strategy": "n_gram", "n_gram_match": 1, "exit_layer": 1}, "layerskip.exit_layer: got 1"),
        (
            _STORED | {"n_gram_match": 0},
            "n_gram_match: got 0, allowed an integer, at least 1 or null, with",
        ),
        ({"strategy": "n_gram", "n_gram_match": 1, "draft_vocabulary_size": 9}, "size: got 9, allowed null, with"),
        (_STORED | {"draft_policy": "off"}, "layerskip.draft_policy: got 'off', allowed fixed | adaptive | dynamic"),
        (_STORED | {"draft_policy": "dynamic"}, "layerskip.draft_exits: got [], allowed a list of exits, with dynamic"),
        ({"strategy": "autoregressive", "draft_exits": [2]}, "draft_exits: got [2], allowed [], with strategy autoreg"),
        (_STORED | {"draft_policy": "dynamic", "draft_exits": [4]}, "layerskip.draft_exits: got 4, allowed [1, 3]"),
        (_STORED | {"draft_policy": "dynamic", "draft_exits": 2}, "layerskip.draft_exits: got 2"),
        ({"strategy": "n_gram", "n_gram_match": 1, "draft_policy": "adaptive"}, "layerskip.draft_policy: got 'adap"),
        (_STORED | {"draft_vocabulary_size": True}, "draft_vocabulary_size: got True, allowed an integer, at least 1"),
        (_STORED | {"draft_vocabulary_size": 0}, "draft_vocabulary_size: got 0, allowed an integer, at least 1"),
        (_STORED | {"draft_vocabulary_size": 10**6}, "draft_vocabulary_size: got 1000000, allowed [1, "),
        ({"strategy": "autoregressive", "head": "big"}, "layerskip.head: got 'big'"),
        ({"strategy": "autoregressive", "head": 10**400}, "layerskip.head: got 1000"),
        ({"strategy": "autoregressive", "overhead": -1.0}, "layerskip.overhead: got -1.0"),
        ({"strategy": "autoregressive", "speed": 2}, "layerskip.speed: got 2, allowed one of conditions, "),
        ({"strategy": "autoregressive", "conditions": "cpu"}, "layerskip.conditions: got 'cpu'"),
        ({"strategy": "autoregressive", "conditions": {"dtype": "float32"}}, "layerskip.conditions: got {"),
        ({"strategy": "autoregressive", "conditions": _HERE | {"threads": 0}}, "layerskip.threads: got 0"),
        ({"strategy": "autoregressive", "conditions": _HERE | {"batch_size": None}}, "layerskip.batch_size: got None"),
        ({"strategy": "autoregressive", "conditions": _HERE | {"device_type": 1}}, "layerskip.device_type: got 1"),
        (
            {"strategy": "autoregressive", "conditions": _HERE | {"cores": 1}},
            "layerskip.cores: got 1, allowed one of batch_size, ",
        ),
    ],
)
def test_a_field_that_tune_would_not_write_is_refused_with_its_path(directory: Path, stored: Any, named: str) -> None:
    _edit(directory, layerskip=stored, _from_model_config=False)
    with pytest.raises(ConfigError, match=r"generation_config\.json.*run layerskip tune again") as refused:
        read_decoding_defaults(_load(directory))
    assert named in str(refused.value)


def test_files_from_before_conditions_were_noted_are_read(directory: Path) -> None:
    _edit(directory, layerskip={"strategy": "autoregressive", "head": 1.5}, _from_model_config=False)
    assert read_decoding_defaults(_load(directory)) == DecodingDefaults(strategy="autoregressive", head=1.5)


def test_conditions_are_those_of_the_model_and_of_torch_here(directory: Path) -> None:
    here = Conditions.of(_load(directory).bfloat16(), batch_size=3)
    threads = torch.get_num_threads()
    assert here == Conditions(dtype="bfloat16", device_type="cpu", threads=threads, batch_size=3)
    assert Conditions.of(_load(directory).to("meta")) == Conditions(dtype="float32", device_type="meta")


def test_what_differs_between_conditions_is_said_in_words() -> None:
    tuned = Conditions(dtype="bfloat16", device_type="cpu", threads=2)
    assert str(tuned) == "bfloat16 on cpu with 2 threads"
    assert str(Conditions(dtype="float16", device_type="cuda")) == "float16 on cuda"
    assert str(Conditions(dtype="float32", device_type="cpu", threads=1, batch_size=4)) == (
        "float32 on cpu with 1 thread and batches of 4"
    )
    for changes, said in (
        ({}, ""),
        ({"dtype": "float32"}, "float32"),
        ({"threads": 1}, "1 thread"),
        ({"device_type": "cuda", "threads": None}, "cuda"),
        ({"dtype": "float32", "threads": 4, "batch_size": 8}, "float32, 4 threads, batches of 8"),
    ):
        assert tuned.differing(replace(tuned, **changes)) == said
