"""What the README.md of an export says, and what it must not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import GPTNeoXConfig

from app.checkpoints.run_record import RUN_CONFIG_KEY, RunRecord
from app.errors import CheckpointError, ConfigError
from app.export.directory import architecture
from app.export.model_card import CardSettings, model_card
from app.model_files.decoding_defaults import Conditions, DecodingDefaults
from tests.support.tiny_models import tiny_config

MODEL = architecture(tiny_config(num_layers=4))
CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "trainer": {"max_steps": 100, "gradient_clip_val": None, "precision": "bf16-mixed"},
    "model": {
        "pretrained": None,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-5, "fused": True, "foreach": None}},
        "lr_schedule": "cosine",
        "warmup_steps": 10,
    },
    "layer_dropout": {"max_dropout_rate": 0.1, "depth_scale": "exponential", "rescale": False},
    "early_exit": {"curriculum": "rotational", "rotation_interval": 8, "early_exit_scale": 0.2, "exit_layers": []},
    "data": {
        "class_path": "datamodules.TextCodeDataModule",
        "init_args": {"sources": {"ab": {"kind": "jsonl", "path": "/home/me/secret.jsonl"}, "py": {"kind": "files"}}},
    },
}
LANES = {"0": [[[0] * 10] * 2, [10, 30], [1, 3], [0.1, 0.2], [5, 5], [0, 0]], "1": [[[0] * 10] * 2, [20, 20], [2, 2]]}
METADATA: dict[str, Any] = {
    "global_step": 60,
    "TextCodeDataModule": {"sources": "ab=3.0, py=1.0", "lanes": LANES, "seq_len": 8},
    "callbacks": {
        "ExitQualityMonitor": {
            "history": {20: {1: (9.0, 0.1), 4: (8.0, 1.0)}, 40: {1: (3.5, 0.25, 2.0, 0.2), 4: (3.0, 1.0, 0.0, 1.0)}}
        }
    },
}


def changed(**groups: dict[str, Any]) -> dict[str, Any]:
    return CONFIG | {group: CONFIG[group] | settings for group, settings in groups.items()}


def card_of(config=CONFIG, metadata=METADATA, decoding=None, **settings) -> ModelCard:
    record = RunRecord(metadata, config)
    return ModelCard(model_card(MODEL, record, decoding, dtype="float32", card=CardSettings(title="mine", **settings)))


def section(card: ModelCard, title: str) -> str:
    return card.text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_front_matter_says_what_a_hub_asks_for():
    data = card_of(license="apache-2.0").data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert "layerskip" in data["tags"]
    assert "base_model" not in data


def test_without_a_licence_the_card_says_that_none_was_chosen():
    card = card_of()
    assert card.data.license == "unknown"
    assert "None was chosen yet" in section(card, "Licence")
    assert "## Licence" not in card_of(license="mit").text


@pytest.mark.parametrize("wrong", ["", "Apache 2.0", "mit\ntags: x", "[mit]"])
def test_a_licence_that_is_no_identifier_is_refused(wrong):
    with pytest.raises(ConfigError, match="license: got"):
        CardSettings(title="mine", license=wrong)


PRETRAINED = [
    ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
    ("gpt2", "gpt2"),
    ("/data/models/my_llama", "my_llama"),
    (
        "/home/me/.cache/huggingface/hub/models--meta-llama--Llama-2-7b-hf/snapshots/01c7f73d",
        "meta-llama/Llama-2-7b-hf",
    ),
    ("runs/quickstart/checkpoints/last.ckpt", None),
    ("smol.gguf", None),
    (None, None),
]


@pytest.mark.parametrize(("pretrained", "base_model"), PRETRAINED)
def test_the_base_model_is_named_as_on_a_hub_and_never_by_a_path(pretrained, base_model):
    card = card_of(changed(model={"pretrained": pretrained}))
    assert card.data.to_dict().get("base_model") == base_model
    assert pretrained is None or "/home" not in pretrained or pretrained not in card.content
    if base_model:
        assert f"continued from {base_model}" in card.text
    assert card_of(changed(model={"pretrained": pretrained}), base_model="org/it").data.base_model == "org/it"


def test_a_folder_that_is_here_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/mine").mkdir(parents=True)
    assert card_of(changed(model={"pretrained": "models/mine"})).data.base_model == "mine"


def test_the_recipe_names_a_scheduler_class():
    scheduler = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 5}}
    recipe = section(card_of(changed(model={"lr_scheduler": scheduler})), "How it was trained")
    assert "| learning rate | StepLR, step_size 5 |" in recipe


def test_the_recipe_lists_what_was_set_and_only_that():
    recipe = section(card_of(), "How it was trained")
    for row in (
        "| started from | random weights |",
        "| optimizer steps | 60 of 100 |",
        "| tokens seen | 80 |",
        "| optimizer | AdamW, peak lr 3e-05, fused |",
        "| learning rate | cosine after 10 steps of warmup |",
        "| gradient clipping | off |",
        "| precision | bf16-mixed |",
        "| layer dropout | max_dropout_rate 0.1, depth_scale exponential |",
        "| early-exit loss | curriculum rotational, rotation_interval 8, early_exit_scale 0.2 |",
        "| seed | 3 |",
    ):
        assert row in recipe
    assert "foreach" not in recipe


VARIANTS = [
    ({}, "the layer dropout and the early-exit loss of [LayerSkip]", True),
    ({"layer_dropout": {"max_dropout_rate": 0.0}}, "with the early-exit loss of [LayerSkip]", True),
    ({"early_exit": {"curriculum": "none"}}, "with the layer dropout of [LayerSkip]", True),
    ({"early_exit": {"early_exit_scale": 0.0}}, "with the layer dropout of [LayerSkip]", True),
    ({"early_exit": {"curriculum": "none"}, "layer_dropout": {"max_dropout_rate": 0.0}}, "a baseline, whose", False),
]


@pytest.mark.parametrize(("groups", "words", "tagged"), VARIANTS)
def test_each_of_the_four_variants_is_called_what_it_is(groups, words, tagged):
    card = card_of(changed(**groups))
    assert words in card.text
    assert ("layerskip" in card.data.tags) == tagged


def test_exits_are_those_of_the_latest_measurement():
    table = section(card_of(), "What its exits learned")
    assert "after 40 steps" in table
    assert "| 1 | 3.500 | 33.1 | 25.0% |" in table
    assert "| 4 (full) | 3.000 | 20.1 | 100.0% |" in table
    assert "9.0" not in table
    assert "What its exits learned" not in card_of(metadata=METADATA | {"callbacks": {}}).text


def test_data_are_described_by_names_kinds_and_shares_and_never_by_a_path():
    card = card_of()
    assert "| ab | jsonl | 75.0% | 37.5% | 30 |" in section(card, "Data")
    assert "| py | files | 25.0% | 62.5% | 50 |" in section(card, "Data")
    assert "secret" not in card.content


def test_data_of_another_kind_are_described_by_their_settings():
    data = {"class_path": "datamodules.TOPv2DataModule", "init_args": {"domains": ["alarm"], "path": "/home/me/topv2"}}
    card = card_of(CONFIG | {"data": data}, {"global_step": 60})
    assert "Settings: domains ['alarm']." in section(card, "Data")
    assert "/home/me" not in card.content
    assert "tokens seen" not in card.text


def test_what_nobody_recorded_is_said_to_be_unknown():
    card = card_of({}, {"global_step": 60})
    assert "| optimizer steps | 60 |" in card.text
    assert "The checkpoint does not say with which settings." in card.text
    assert "The checkpoint does not say what it was trained on." in card.text


def test_a_model_without_a_run_has_no_recipe_and_is_not_said_to_exit_early():
    card = ModelCard(model_card(MODEL, None, None, dtype="bfloat16", card=CardSettings(title="mine")))
    assert "A `LlamaForCausalLM` of 4 blocks, 39,104 parameters, bfloat16." in card.text
    assert "How it was trained" not in card.text
    assert "do_sample=False)[0]" in section(card, "How to decode with it")
    for claim in ("layerskip", "early", "draft, not a smaller"):
        assert claim not in card.content.lower()
    tuned = model_card(MODEL, None, TUNED, dtype="bfloat16", card=CardSettings(title="mine"))
    assert "assistant_early_exit=3" in tuned  # that was measured


def test_drafting_is_told_of_exits_that_were_trained_in_architectures_that_are_known():
    baseline = card_of(changed(early_exit={"curriculum": "none"}, layer_dropout={"max_dropout_rate": 0.0}))
    assert "assistant_early_exit=1" in section(card_of(), "How to decode with it")
    assert "assistant_early_exit" not in section(baseline, "How to decode with it")
    other = architecture(GPTNeoXConfig(num_hidden_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=61))
    text = model_card(other, RunRecord(METADATA, CONFIG), None, dtype="float32", card=CardSettings(title="mine"))
    assert "draft what all of them verify" in text
    assert "assistant_early_exit" not in text


def test_a_model_with_exit_blocks_is_called_unchanged_and_drafts_from_them():
    off = {"early_exit": {"curriculum": "none"}, "layer_dropout": {"max_dropout_rate": 0.0}}
    exit_blocks = {"exits": {"3": 1, "2": 1}, "start": "exit", "loss": "lk"}
    card = card_of(changed(model={"pretrained": "org/base", "exit_blocks": exit_blocks}, **off))
    assert (
        "continued from org/base, whose weights are unchanged. Exits 2, 3 learned, with blocks of their own"
        in card.text
    )
    assert "| exit blocks | exits {'3': 1, '2': 1}, start exit, loss lk |" in card.text
    assert "baseline" not in card.content
    assert "Until then, 2 of 4 blocks is a guess" in card.text
    assert "assistant_early_exit=2" not in card.text  # transformers would draft without them


def test_the_origin_of_a_model_that_no_run_made_is_told():
    card = CardSettings(title="mine", origin="unpacked from a file of type Q4_1")
    text = model_card(MODEL, None, None, dtype="bfloat16", card=card)
    assert "39,104 parameters, bfloat16, unpacked from a file of type Q4_1." in text


TUNED = DecodingDefaults(
    strategy="self_speculative",
    exit_layer=3,
    num_draft_tokens=5,
    measured_speedup=1.456,
    conditions=Conditions(dtype="bfloat16", device_type="cpu", threads=2),
)


def test_how_to_decode_is_what_tune_found():
    tuned = section(card_of(decoding=TUNED), "How to decode with it")
    assert "drafts of 5 tokens from exit 3, measured on bfloat16 on cpu with 2 threads: 1.46x." in tuned
    assert "do_sample=False, assistant_early_exit=3)" in tuned
    changing = replace(TUNED, draft_policy="dynamic", draft_exits=(1, 2))
    assert "chose drafts of up to 5 tokens from exit 3 or 1 or 2, measured" in section(
        card_of(decoding=changing), "How to decode with it"
    )
    both = section(card_of(decoding=replace(TUNED, n_gram_match=2)), "How to decode with it")
    assert "chose drafts of what followed the latest 2 tokens before, else of 5 tokens from exit 3, measured on" in both
    found = section(card_of(decoding=DecodingDefaults(strategy="n_gram", n_gram_match=2)), "How to decode with it")
    assert "Drafts of what followed the latest 2 tokens before were not measured" in found
    assert "assistant_early_exit" not in found
    plain = section(card_of(decoding=DecodingDefaults(strategy="autoregressive")), "How to decode with it")
    assert "no setting that was faster" in plain
    assert "assistant_early_exit" not in plain


def test_another_licence_on_a_card_changes_nothing_else():
    text = "---\nlicense: mit\ntags:\n- x\n---\n\n# Theirs\n\nWords.\n"
    changed_text = ModelCard(CardSettings(title="mine", license="other").relabelled(text))
    assert (changed_text.data.license, changed_text.data.tags) == ("other", ["x"])
    assert changed_text.text.strip() == "# Theirs\n\nWords."
    assert CardSettings(title="mine").relabelled(text) == text


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("license: mit\nbase_model: org/base", ("mit", "org/base")),
        ("license: unknown\nbase_model: [org/one, org/two]", (None, ["org/one", "org/two"])),
        ("license: Ask Us\nbase_model: org/base", (None, "org/base")),
        ("license: [mit, bsd]", (None, None)),
    ],
)
def test_a_card_completes_what_the_user_left_open(tmp_path, caplog, said, kept):
    (tmp_path / "README.md").write_text(f"---\n{said}\n---\n# It\n")
    card = CardSettings(title="mine").completed_from_card(tmp_path, name="the card")
    assert (card.license, card.base_model) == kept
    assert ("which is no name of the hub's" in caplog.text) == ("Ask" in said or "bsd" in said)
    given = CardSettings(title="mine", license="other", base_model="org/mine")
    assert given.completed_from_card(tmp_path, name="the card") == given


# -- where the config of a run is found --------------------------------------------------------------------------------


def test_the_config_in_the_checkpoint_counts_and_without_one_that_beside_its_folder(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    assert RunRecord.of(checkpoint, METADATA).config == {}
    by_hand = CONFIG | {"model": {"warmup_steps": 5}}  # what has a default is left out
    for config, understood in ((by_hand, {}), (CONFIG | {"model": None}, {}), (CONFIG, CONFIG)):
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
        assert RunRecord.of(checkpoint, METADATA).config == understood
    own = changed(trainer={"max_steps": 7})
    held = METADATA | {RUN_CONFIG_KEY: yaml.safe_dump(own)}
    assert RunRecord.of(checkpoint, held).config == own
    (tmp_path / "run" / "config.yaml").write_text("version: 2\ntrainer: {}\n")  # of something else
    assert RunRecord.of(checkpoint, METADATA).config == {}


def test_a_damaged_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"the config of checkpoint .* is damaged"):
        RunRecord.of(tmp_path / "a" / "last.ckpt", METADATA | {RUN_CONFIG_KEY: "{"})
