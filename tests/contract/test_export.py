"""`layerskip export` as its user meets it: what it writes is what plain transformers loads, whole or not at all."""

import errno
import json
import multiprocessing
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from app.model.checkpoint import load_for_decoding
from tests.support.runs import cli, make_data, make_module, make_trainer
from tests.support.tiny_models import tiny_llama

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A Lightning checkpoint of a short training."""
    root = tmp_path_factory.mktemp("run")
    trainer = make_trainer(root, max_steps=1, callbacks=[])
    trainer.fit(make_module(), datamodule=make_data(root))
    trainer.save_checkpoint(root / "run.ckpt")
    return str(root / "run.ckpt")


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
    assert capsys.readouterr().out == f"{out}: LlamaForCausalLM, {size:,} parameters, float32\n"
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
    assert capsys.readouterr().out.endswith(f" parameters, {expected}\n")
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
    (["--model", "RUN", "--output_dir", "full"], "output_dir: got 'full', allowed a directory that is new or empty"),
    (["--model", "RUN", "--output_dir", "full/kept"], "output_dir: got 'full/kept', allowed a directory that is new"),
    (["--model", "RUN", "--output_dir", "full/kept/out"], "cannot write"),
    (["--model", "RUN", "--output_dir", "out", "--dtype", "int8"], "dtype: got int8, allowed auto | float32 | "),
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

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)  # after the weights
    assert cli(monkeypatch, "export", "--model", run, "--output_dir", str(tmp_path / "out")) == 2
    assert "out: [Errno 28] No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_no_output_and_the_next_one_clears_up(run, tmp_path, monkeypatch):
    def export_and_die():
        patch = pytest.MonkeyPatch()
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda *args, **kwargs: os._exit(9))
        cli(patch, "export", "--model", run, "--output_dir", str(tmp_path / "out"))

    child = multiprocessing.get_context("fork").Process(target=export_and_die)
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 9
    assert [entry.name for entry in tmp_path.iterdir()] == [".out.partial"]
    assert cli(monkeypatch, "export", "--model", run, "--output_dir", str(tmp_path / "out")) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
