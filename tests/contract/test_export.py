"""`layerskip export` as its user meets it: what it writes is what plain transformers loads, whole or not at all."""

import errno
import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from app.generation.loaded_model import load_decoder
from app.model.early_exit import EarlyExitModel
from app.model_files.decoding_defaults import (
    Conditions,
    DecodingDefaults,
    read_decoding_defaults,
    write_decoding_defaults,
)
from app.model_files.draft_vocabulary import DRAFT_VOCABULARY_FILE, write_draft_vocabulary
from app.model_files.exit_blocks import load_exit_blocks
from app.model_files.open import load_for_decoding, open_tokenizer
from app.training.exit_block_steps import ExitBlockSettings
from app.training.module import LayerSkipModule
from tests.support.runs import cli, make_data, make_module, make_trainer
from tests.support.tiny_models import tiny_llama

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A Lightning checkpoint of a short training."""
    root = tmp_path_factory.mktemp("run")
    trainer = make_trainer(root, max_steps=1, callbacks=[])
    trainer.fit(make_module(), datamodule=make_data(root))
    trainer.save_checkpoint(root / "checkpoints" / "run.ckpt")
    return str(root / "checkpoints" / "run.ckpt")


@pytest.fixture(scope="module")
def directory(run, tmp_path_factory):
    """A Hugging Face directory without any end of text in its configurations."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    tiny_llama(vocab_size=300).save_pretrained(folder)
    load_for_decoding(run, dtype=None)[1].save_pretrained(folder)
    return str(folder)


def assert_same_model(source, exported, *, dtype):
    ours, our_tokenizer = load_for_decoding(source, dtype=dtype)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert plain.dtype == dtype
    ids = tokenizer("def function(x):", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == our_tokenizer("def function(x):")["input_ids"]
    with torch.inference_mode():
        assert torch.equal(plain(ids).logits, ours(ids).logits)
    eos = json.loads((exported / "generation_config.json").read_text())["eos_token_id"]
    assert eos == tokenizer.eos_token_id is not None


def test_checkpoint_becomes_a_directory_that_plain_transformers_loads(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "out"
    assert cli(monkeypatch, "export", "--ckpt_path", run, "--output_dir", str(out)) == 0
    size = sum(parameter.numel() for parameter in load_for_decoding(run, dtype=None)[0].parameters())
    told, next_step = capsys.readouterr().out.splitlines()  # nothing of another dtype that it started from
    assert told == f"{out}: LlamaForCausalLM, {size:,} parameters, float32, in 1 file"
    assert next_step.startswith(f"not tuned: layerskip tune --model {out} ")
    assert {file.name for file in out.iterdir()} == FILES
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1  # readable for whom the others are
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]
    assert_same_model(run, out, dtype=torch.float32)


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_directory_becomes_one_of_the_dtype_asked_for(directory, tmp_path, monkeypatch, capsys, dtype, expected):
    (tmp_path / "out").mkdir()  # empty
    assert (
        cli(monkeypatch, "export", "--model", directory, "--output_dir", str(tmp_path / "out"), "--dtype", dtype) == 0
    )
    assert f" parameters, {expected}, in 1 file\n" in capsys.readouterr().out
    assert_same_model(directory, tmp_path / "out", dtype=getattr(torch, expected))


def test_exporting_an_export_changes_no_weight(run, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli(monkeypatch, "export", "--model", run, "--output_dir", str(first), "--dtype", "bfloat16") == 0
    assert cli(monkeypatch, "export", "--model", str(first), "--output_dir", str(second)) == 0
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]


ONE_OF = "allowed exactly one of model and ckpt_path"
MISTAKES = [
    (["--output_dir", "out"], f"model: got 'neither', {ONE_OF}"),
    (["--model", "a", "--ckpt_path", "b", "--output_dir", "out"], f"model: got 'both', {ONE_OF}"),
    (["--ckpt_path", "absent.ckpt", "--output_dir", "out"], "ckpt_path: got 'absent.ckpt', allowed a Hugging Face"),
    (["--model", "RUN", "--output_dir", "full"], "output_dir: got 'full', allowed a directory that is new, empty or"),
    (["--model", "RUN", "--output_dir", "full", "--overwrite", "true"], "it holds something else: choose another"),
    (["--model", "RUN", "--output_dir", "full/kept"], "output_dir: got 'full/kept', allowed a directory that is new"),
    (["--model", "RUN", "--output_dir", "out", "--license", "Apache 2"], "license: got 'Apache 2', allowed an identif"),
    (["--model", "RUN", "--output_dir", "out", "--max_shard_size", "5"], "max_shard_size: got '5', allowed digits and"),
    (
        ["--model", "RUN", "--output_dir", "out", "--generation_defaults", "no"],
        "generation_defaults: got 'no', allowed",
    ),
    (["--model", "RUN", "--output_dir", "full/kept/out"], "cannot write"),
    (["--model", "RUN", "--output_dir", "out", "--dtype", "int8"], "dtype: got int8, allowed auto | float32 | "),
    (["--model", "RUN", "--output_dir", "out", "--exit_layer", "0"], "exit_layer: got 0, allowed [1, "),
    (["--model", "RUN", "--output_dir", "out", "--exit_layer", "99"], "exit_layer: got 99, allowed [1, "),
    (
        ["--model", "RUN", "--output_dir", "out", "--exit_layer", "1", "--adapter_dir", "a"],
        "adapter_dir: got 'a', allowed only for the whole model",
    ),
    (["--model", "RUN", "--output_dir", "out", "--foo", "1"], "foo: unknown key"),
    (["--model", "RUN"], "output_dir"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_ends_with_status_2_and_writes_nothing(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    assert cli(monkeypatch, "export", *[run if argument == "RUN" else argument for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err[err.index("error:") :].strip().splitlines()) <= 2
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["full", "full/kept"]
    assert (tmp_path / "full" / "kept").read_text() == "kept"


def test_a_full_disk_ends_with_status_2_and_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", fail)  # after the weights
    assert cli(monkeypatch, "export", "--model", run, "--output_dir", str(tmp_path / "out")) == 2
    assert "out: [Errno 28] No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_export_that_is_told_to_end_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(GenerationConfig, "save_pretrained", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert cli(monkeypatch, "export", "--model", run, "--output_dir", str(tmp_path / "out")) == 143
    assert not list(tmp_path.iterdir())


# -- what a user gets out of it ----------------------------------------------------------------------------------------


def test_transformers_drafts_from_an_exit_of_it_and_writes_what_it_writes_without(run, tmp_path, monkeypatch):
    assert cli(monkeypatch, "export", "--ckpt_path", run, "--output_dir", str(tmp_path / "out")) == 0
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    inputs, depths = tokenizer("def function(x):", return_tensors="pt"), []
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    model.lm_head.register_forward_pre_hook(lambda *_: depths.append(model.config.num_hidden_layers))
    for exit_layer in (1, 3):
        drafted = model.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_early_exit=exit_layer)
        assert torch.equal(drafted, expected)
    assert set(depths) == {1, 3, 4}  # it did draft


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_goes_in_and_is_not_trained_comes_out_bit_by_bit(tied, run, tmp_path, monkeypatch, capsys):
    model = tiny_llama(vocab_size=300, tied=tied, num_layers=4).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    trainer = make_trainer(tmp_path, max_steps=1, limit_train_batches=0, callbacks=[])
    trainer.fit(make_module(config=None, pretrained=str(tmp_path / "in")), datamodule=make_data(tmp_path))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    arguments = ["--ckpt_path", str(tmp_path / "run.ckpt"), "--output_dir"]
    assert cli(monkeypatch, "export", *arguments, str(tmp_path / "out"), "--dtype", "bfloat16") == 0
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "in" / file).read_bytes()
    capsys.readouterr()
    assert cli(monkeypatch, "export", *arguments, str(tmp_path / "as_trained")) == 0
    assert "its weights are float32, as they were trained; it started from bfloat16: --dtype" in capsys.readouterr().out


def test_many_files_of_weights_are_one_model(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert cli(monkeypatch, "export", "--ckpt_path", run, "--output_dir", str(out), "--max_shard_size", "50KB") == 0
    number = len([*out.glob("model-*.safetensors")])
    assert f"float32, in {number} files\n" in capsys.readouterr().out
    assert number > 1
    assert_same_model(run, out, dtype=torch.float32)


def test_a_model_whose_generation_config_transformers_would_not_save_can_be_trained_from_and_exported(
    directory, tmp_path, monkeypatch, capsys
):
    source = shutil.copytree(directory, tmp_path / "source")
    (source / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "top_p": 0.9}')
    trainer = make_trainer(tmp_path, max_steps=1, limit_train_batches=0, callbacks=[])
    trainer.fit(make_module(config=None, pretrained=str(source)), datamodule=make_data(tmp_path))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    for name in ("source", "run.ckpt"):
        capsys.readouterr()
        out = tmp_path / f"out of {name}"
        assert cli(monkeypatch, "export", "--model", str(tmp_path / name), "--output_dir", str(out)) == 0
        err = capsys.readouterr().err
        assert err.count("fields that have no effect are dropped: temperature 0.6, top_p 0.9") == 1
        assert "not valid" not in err  # transformers' own words
        assert GenerationConfig.from_pretrained(out).temperature is None


# -- tuned -------------------------------------------------------------------------------------------------------------

TUNED = DecodingDefaults(
    strategy="self_speculative",
    exit_layer=2,
    num_draft_tokens=3,
    measured_speedup=1.5,
    conditions=Conditions(dtype="float32", device_type="cpu", threads=1),
)


def defaults_of(directory):
    return read_decoding_defaults(AutoModelForCausalLM.from_pretrained(directory))


def test_exporting_again_over_a_tuned_directory_keeps_what_was_tuned_the_licence_and_the_base_model(
    run, tmp_path, monkeypatch, capsys
):
    export = ["export", "--ckpt_path", run, "--output_dir", str(tmp_path / "out")]
    assert cli(monkeypatch, *export, "--license", "mit", "--base_model", "org/base") == 0
    assert defaults_of(tmp_path / "out") is None
    tuned = replace(TUNED, draft_vocabulary_size=9)
    ids = (*load_decoder(str(tmp_path / "out"), dtype="auto", device="cpu").eos_token_ids, *range(40, 60))[:9]
    write_draft_vocabulary(tmp_path / "out", ids)
    write_decoding_defaults(tmp_path / "out", tuned)
    assert cli(monkeypatch, *export, "--dtype", "bfloat16") == 0
    assert defaults_of(tmp_path / "out") == tuned
    content = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (content["assistant_early_exit"], content["num_assistant_tokens"]) == (2, 3)
    assert load_decoder(str(tmp_path / "out"), dtype="auto", device="cpu").decoder.draft_vocabulary == ids
    readme = ModelCard.load(tmp_path / "out" / "README.md")
    assert (readme.data.license, readme.data.base_model) == ("mit", "org/base")
    assert "chose drafts of 3 tokens from exit 2" in readme.text
    printed = capsys.readouterr()
    assert "kept from the directory that was there: exit_layer 2, num_draft_tokens 3" in printed.err
    assert "kept from the card that was there: license mit" in printed.err
    assert "kept from the card that was there: base_model org/base" in printed.err
    assert "decoding, as layerskip tune chose: exit_layer 2, num_draft_tokens 3" in printed.out


def test_what_was_tuned_for_more_blocks_is_not_kept_and_that_is_said(run, tmp_path, monkeypatch, capsys):
    export = ["export", "--ckpt_path", run, "--output_dir", str(tmp_path / "out")]
    assert cli(monkeypatch, *export) == 0
    write_decoding_defaults(tmp_path / "out", replace(TUNED, exit_layer=7))
    assert cli(monkeypatch, *export) == 0
    assert defaults_of(tmp_path / "out") is None
    assert "does not fit this model and is not kept" in capsys.readouterr().err


@pytest.fixture
def trained_on(run, tmp_path):
    """The same checkpoint after another step: one value of one weight is another."""
    content = torch.load(run, weights_only=True)
    name = "model.model.layers.1.mlp.up_proj.weight"
    content["state_dict"][name][2, 3] += 1e-3
    torch.save(content, tmp_path / "on.ckpt")
    return str(tmp_path / "on.ckpt")


def test_what_was_tuned_for_other_weights_is_not_kept_and_that_is_said(run, trained_on, tmp_path, monkeypatch, capsys):
    assert cli(monkeypatch, "export", "--ckpt_path", run, "--output_dir", str(tmp_path / "out")) == 0
    write_decoding_defaults(tmp_path / "out", TUNED)
    write_draft_vocabulary(tmp_path / "out", range(40))
    assert cli(monkeypatch, "export", "--ckpt_path", trained_on, "--output_dir", str(tmp_path / "out")) == 0
    printed = capsys.readouterr()
    assert "draft_vocabulary.json was made for other weights and is not kept" in printed.err
    assert not (tmp_path / "out" / DRAFT_VOCABULARY_FILE).exists()
    assert "was for other weights and is not kept: exit_layer 2, num_draft_tokens 3" in printed.err
    assert "not tuned: layerskip tune --model" in printed.out
    assert defaults_of(tmp_path / "out") is None
    assert "chose drafts" not in ModelCard.load(tmp_path / "out" / "README.md").text


def test_defaults_given_of_other_weights_are_taken_without_what_was_measured(
    run, trained_on, tmp_path, monkeypatch, capsys
):
    assert cli(monkeypatch, "export", "--ckpt_path", run, "--output_dir", str(tmp_path / "tuned")) == 0
    tuned = replace(TUNED, draft_exits=(1,))  # for whoever asks for policy dynamic
    write_decoding_defaults(tmp_path / "tuned", tuned)
    given = ["--output_dir", str(tmp_path / "out"), "--generation_defaults", str(tmp_path / "tuned")]
    assert cli(monkeypatch, "export", "--ckpt_path", trained_on, *given) == 0
    assert defaults_of(tmp_path / "out") == replace(tuned, measured_speedup=None, conditions=None)
    assert "not measured on these weights" in ModelCard.load(tmp_path / "out" / "README.md").text
    printed = capsys.readouterr()
    assert "tuned holds other weights: what layerskip tune chose is taken, what it measured is not" in printed.err
    assert "decoding, as given: exit_layer 2, num_draft_tokens 3; layerskip tune --model" in printed.out


@pytest.mark.parametrize("size", [None, 8, 9])
def test_a_number_of_ids_that_no_list_has_is_not_kept_with_what_was_measured(size, run, tmp_path, monkeypatch, capsys):
    tuned = replace(TUNED, draft_vocabulary_size=9)
    (tmp_path / "tune.json").write_text(json.dumps(asdict(tuned)))
    end = load_decoder(run, dtype="auto", device="cpu").eos_token_ids
    (tmp_path / "ids.json").write_text(json.dumps([*end, *range(40, 60)][: size or 0]))
    given = ["--generation_defaults", str(tmp_path / "tune.json"), "--output_dir", str(tmp_path / "out")]
    given += [] if size is None else ["--draft_vocabulary", str(tmp_path / "ids.json")]
    assert cli(monkeypatch, "export", "--ckpt_path", run, *given) == 0
    said = "chose drafts from 9 token ids, but there is " in capsys.readouterr().err
    kept = replace(TUNED, measured_speedup=None, conditions=None)
    assert (defaults_of(tmp_path / "out"), said) == ((tuned, False) if size == 9 else (kept, True))
    used = load_decoder(str(tmp_path / "out"), dtype="auto", device="cpu").decoder.draft_vocabulary
    assert (used and len(used)) == size


@pytest.mark.parametrize("form", ["directory", "its file", "tune --json"])
def test_what_tune_found_can_be_given(form, run, directory, tmp_path, monkeypatch):
    assert cli(monkeypatch, "export", "--ckpt_path", run, "--output_dir", str(tmp_path / "tuned")) == 0
    write_decoding_defaults(tmp_path / "tuned", TUNED)
    (tmp_path / "tune.json").write_text(json.dumps(asdict(TUNED) | {"reason": "fastest", "stored": None}))
    given = {"directory": "tuned", "its file": "tuned/generation_config.json", "tune --json": "tune.json"}[form]
    arguments = ["--output_dir", str(tmp_path / "out"), "--generation_defaults", str(tmp_path / given)]
    assert cli(monkeypatch, "export", "--ckpt_path", run, *arguments) == 0
    assert defaults_of(tmp_path / "out") == TUNED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "allowed what layerskip tune stored; nothing of the kind is in it"),
        ("[1]", "allowed a tuned model directory, a generation_config.json, or the output of layerskip tune --json"),
        ("{", "allowed a tuned model directory"),
        (json.dumps({"strategy": "self_speculative", "exit_layer": 4, "num_draft_tokens": 1}), "exit_layer: got 4"),
    ],
)
def test_defaults_that_are_none_or_do_not_fit_are_refused(content, message, run, tmp_path, monkeypatch, capsys):
    (tmp_path / "tune.json").write_text(content)
    given = ["--generation_defaults", str(tmp_path / "tune.json")]
    assert cli(monkeypatch, "export", "--ckpt_path", run, "--output_dir", str(tmp_path / "out"), *given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tuned_directory_exported_elsewhere_is_tuned_and_has_its_card(run, tmp_path, monkeypatch):
    assert cli(monkeypatch, "export", "--ckpt_path", run, "--output_dir", str(tmp_path / "first")) == 0
    write_decoding_defaults(tmp_path / "first", TUNED)
    arguments = ["--model", str(tmp_path / "first"), "--output_dir", str(tmp_path / "second"), "--license", "mit"]
    assert cli(monkeypatch, "export", *arguments) == 0
    assert defaults_of(tmp_path / "second") == TUNED
    first, second = (ModelCard.load(tmp_path / name / "README.md") for name in ("first", "second"))
    assert (first.data.license, second.data.license) == ("unknown", "mit")
    assert second.text.split("<!--")[0] == first.text.split("<!--")[0]
    assert cli(monkeypatch, "export", *arguments) == 0  # its signature is its own


# -- the card of a run -------------------------------------------------------------------------------------------------

FIT = {
    "trainer.max_steps": "2",
    "trainer.limit_val_batches": "1",
    "trainer.val_check_interval": "2",
    "trainer.check_val_every_n_epoch": "null",
    "trainer.enable_progress_bar": "false",
    "trainer.callbacks": '[{"class_path": "callbacks.ExitQualityMonitor"}, {"class_path":'
    ' "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": true}}]',
    "model.lr_schedule": "constant",
    "layer_dropout.max_dropout_rate": "0.25",
    "early_exit.curriculum": "rotational",
    "early_exit.rotation_interval": "3",
    "data": "datamodules.TextCodeDataModule",
    "data.seq_len": "24",
    "data.batch_size": "4",
    "data.validation_share": "0.2",
    "data.vocab_size": "300",
}


def test_the_card_of_a_run_tells_its_recipe_data_and_exits(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = str(make_data(tmp_path)._sources[0].path)
    sources = json.dumps({"mine": {"kind": "files", "path": corpus}})
    folder = str(shutil.copytree(directory, tmp_path / "hf"))
    options = FIT | {"model.pretrained": folder, "data.sources": sources}
    assert cli(monkeypatch, "fit", *[f"--{name}={value}" for name, value in options.items()]) == 0
    checkpoint = next(tmp_path.rglob("last.ckpt")).rename(tmp_path / "moved.ckpt")
    assert cli(monkeypatch, "export", "--ckpt_path", str(checkpoint), "--output_dir", "out") == 0
    own, exported = (open_tokenizer(str(path), field="model") for path in (folder, tmp_path / "out"))
    assert exported.get_vocab() == own.get_vocab()  # a model that is continued keeps its tokenizer, without being asked
    readme = ModelCard.load(tmp_path / "out" / "README.md")
    assert readme.data.base_model == "hf"
    assert str(tmp_path) not in readme.content  # no path of this machine, nor of the corpus
    for line in (
        "| started from | hf |",
        "| optimizer steps | 2 of 2 |",
        "| tokens seen | 192 |",
        "| layer dropout | max_dropout_rate 0.25, depth_scale exponential, time_scale constant |",
        "| mine | files | 100.0% | 100.0% | 192 |",
        "Measured after 2 steps on tokens",
    ):
        assert line in readme.text
    assert len([line for line in readme.text.splitlines() if line.endswith("% |")]) == 4  # exits
    assert readme.data.license == "unknown"
    (Path(folder) / "README.md").write_text("---\nlicense: llama2\nbase_model: org/base\n---\n# It\n")
    assert cli(monkeypatch, "export", "--ckpt_path", str(checkpoint), "--output_dir", "of_its_card") == 0
    readme = ModelCard.load(tmp_path / "of_its_card" / "README.md")
    assert (readme.data.license, readme.data.base_model) == ("llama2", "org/base")


@pytest.mark.parametrize(("said", "exported"), [([0, 7], [0, 7]), (2, [2, 0]), (None, 0)])
def test_what_a_pretrained_model_says_of_generation_comes_out_but_not_what_was_tuned_for_it(
    tmp_path, monkeypatch, said, exported
):
    """And its texts end where they were trained to end: 0 is the end of text of the run's tokenizer."""
    model = tiny_llama(vocab_size=300, max_length=128)
    model.generation_config = GenerationConfig(
        eos_token_id=said, temperature=0.6, do_sample=True, assistant_early_exit=2, num_assistant_tokens=3
    )
    model.generation_config.layerskip = {"strategy": "autoregressive"}
    model.save_pretrained(tmp_path / "hf")
    trainer = make_trainer(tmp_path, max_steps=1, limit_train_batches=0, callbacks=[])
    trainer.fit(make_module(config=None, pretrained=str(tmp_path / "hf")), datamodule=make_data(tmp_path))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    arguments = ["--ckpt_path", str(tmp_path / "run.ckpt"), "--output_dir", str(tmp_path / "out")]
    assert cli(monkeypatch, "export", *arguments) == 0
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.temperature, generation.do_sample) == (exported, 0.6, True)
    decoded = load_for_decoding(str(tmp_path / "run.ckpt"), dtype=None)[0].generation_config
    assert (decoded.eos_token_id, decoded.temperature, decoded.do_sample) == (exported, 0.6, True)
    assert generation.assistant_early_exit is None
    assert not hasattr(generation, "layerskip")


def exit_logits(path, exit_layer, ids):
    """What an exit says, by the network that trains, and by the exit's own blocks if it has any."""
    model = load_for_decoding(path, dtype=None)[0]
    block = load_exit_blocks(path, model).get(exit_layer)
    network, positions = EarlyExitModel(model), torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        if block is not None:
            block.decoder.rotary_emb = model.model.rotary_emb  # its own were rounded to the weights' type
            return network.head(block(network.states(ids, positions, [exit_layer])[exit_layer], positions))
        return network.head(network.hidden_by_exit(ids, positions, [exit_layer])[exit_layer])


@pytest.mark.parametrize("source", ["run", "directory"])
def test_an_exit_becomes_a_model_of_its_own_which_drafts_for_the_whole_one(
    source, request, tmp_path, monkeypatch, capsys
):
    source, out = request.getfixturevalue(source), tmp_path / "exit"
    if Path(source).is_dir():
        source = shutil.copytree(source, tmp_path / "tuned")
        write_decoding_defaults(source, replace(TUNED, exit_layer=3))
        (source / "README.md").write_text("---\nlicense: mit\nbase_model: some/body\n---\n# whole\n")
    arguments = ["--model", str(source), "--output_dir", str(out), "--exit_layer", "2"]
    assert cli(monkeypatch, "export", *arguments) == 0
    assert f"--model {source} --strategy draft_model --draft_model {out}" in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == FILES | {"exit_of.json"}
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert plain.config.num_hidden_layers == len(plain.model.layers) == 2
    ids = tokenizer("def function(x):", return_tensors="pt")["input_ids"]
    assert torch.equal(plain(ids).logits, exit_logits(str(source), 2, ids))
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert not {"layerskip", "assistant_early_exit"} & generation.keys()
    readme = (out / "README.md").read_text()
    name = Path(source).name if Path(source).is_dir() else f"{Path(source).parts[-3]}/{Path(source).name}"  # of the run
    assert f"the first 2 of the 4 blocks of {name}" in readme
    assert "drafts what" in readme
    if Path(source).is_dir():
        assert (ModelCard(readme).data.license, ModelCard(readme).data.base_model) == ("mit", "some/body")
    whole = load_for_decoding(str(source), dtype=None)[0]
    settings = {"max_new_tokens": 12, "do_sample": False, "assistant_early_exit": None}
    drafted = whole.generate(ids, assistant_model=plain, **settings)
    assert torch.equal(drafted, whole.generate(ids, **settings))
    draft = ["--strategy", "draft_model", "--draft_model", str(out), "--prompt", "def ", "--max_new_tokens", "4"]
    assert cli(monkeypatch, "generate", "--model", str(source), *draft) == 0
    other = shutil.copytree(out, tmp_path / "other")
    told = json.loads((out / "exit_of.json").read_text())
    (other / "exit_of.json").write_text(json.dumps(told | {"weights_hash": "0" * 64}))
    capsys.readouterr()
    assert cli(monkeypatch, "generate", "--model", str(source), *draft, "--draft_model", str(other)) == 2
    assert f"draft_model: got '{other}', allowed an exit of the model" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_exit_blocks_and_a_draft_vocabulary_go_beside_a_model_whose_weights_stay_bit_for_bit(
    run, tmp_path, monkeypatch, dtype
):
    root, output, again = tmp_path / "exits", tmp_path / "hf", tmp_path / "again"
    module = LayerSkipModule(pretrained=run, exit_blocks=ExitBlockSettings({1: 1, 2: 0}))
    trainer = make_trainer(root, max_steps=2, callbacks=[])
    trainer.fit(module, datamodule=make_data(root))
    trainer.save_checkpoint(root / "run.ckpt")
    trained = load_decoder(str(root / "run.ckpt"), dtype="auto", device="cpu")
    assert trained.decoder.own_exits == (1, 2)
    (ids := tmp_path / "ids.json").write_text(json.dumps([*trained.eos_token_ids, 40, 41]))
    given = ["--ckpt_path", str(root / "run.ckpt"), "--dtype", dtype, "--draft_vocabulary", str(ids)]
    assert cli(monkeypatch, "export", "--output_dir", str(output), *given) == 0
    assert cli(monkeypatch, "export", "--output_dir", str(again), "--model", str(output)) == 0
    wanted = {"auto": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    plain = load_for_decoding(run, dtype=wanted)[0].state_dict()
    for folder in (output, again):
        exported = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(exported[name], tensor) for name, tensor in plain.items())
        loaded = load_decoder(str(folder), dtype=dtype, device="cpu")
        assert loaded.decoder.own_exits == (1, 2)
        assert loaded.decoder.draft_head_size == (len(trained.eos_token_ids) + 2) * 32
        own = [load_exit_blocks(str(path), loaded.model) for path in (root / "run.ckpt", folder)]
        for theirs, ours in zip(own[0].values(), own[1].values(), strict=True):
            pairs = zip(theirs.parameters(), ours.parameters(), strict=True)
            assert all(torch.equal(first, second) for first, second in pairs)
    ids = torch.arange(20)[None]
    for source, exit_layer in ((root / "run.ckpt", 1), (output, 1), (output, 2)):
        cut = tmp_path / f"exit {exit_layer} of {source.name}"
        chosen = ["--model", str(source), "--exit_layer", str(exit_layer)]
        assert cli(monkeypatch, "export", "--output_dir", str(cut), *chosen) == 0
        logits = AutoModelForCausalLM.from_pretrained(cut)(ids).logits
        assert torch.equal(logits, exit_logits(str(source), exit_layer, ids))
        assert {file.name for file in cut.iterdir()} == FILES | {"exit_of.json"}
    write_decoding_defaults(output, replace(TUNED, exit_layer=1))
    assert cli(monkeypatch, "export", "--output_dir", str(output), *given) == 0  # an export replaces an export
    assert defaults_of(output) == replace(TUNED, exit_layer=1)
