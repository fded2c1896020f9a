"""Checkpoints, models, tokenizers and caches from elsewhere: what they hold is read, never run."""

import io
import json
import os
import pickle

import lightning
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from app.checkpoints.shards import METADATA_FILE
from app.errors import CheckpointError
from app.text.tokenizer_files import tokenizer_from_files
from app.training.strategy import MeshStrategy
from tests.support.checkpoints import write_manifest
from tests.support.processes import run_ranks
from tests.support.runs import cli, make_data, make_module, make_trainer, write_corpus
from tests.support.saved_models import save_model
from tests.support.stream_runs import write_config


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def touched(tmp_path):
    return tmp_path / "touched"


@pytest.fixture
def config(tmp_path):
    sources = {"code": {"kind": "files", "path": str(write_corpus(tmp_path / "corpus"))}}
    return write_config(tmp_path, sources, max_steps=2, checkpoint_every=2)


def as_torch_file(touched):
    content = io.BytesIO()
    torch.save({"state_dict": {}, "payload": Payload(touched)}, content)
    return content.getvalue()


def test_the_payload_works(touched, tmp_path):
    """Else no test below could fail."""
    pickle.loads(pickle.dumps(Payload(touched)))  # noqa: S301
    touched.rmdir()
    torch.load(io.BytesIO(as_torch_file(touched)), weights_only=False)
    touched.rmdir()


FORMS = {"torch.save": as_torch_file, "pickle": lambda touched: pickle.dumps(Payload(touched))}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("verb", ["fit", "validate", "export", "generate"])
def test_a_checkpoint_file(config, touched, tmp_path, monkeypatch, capsys, form, verb):
    path = tmp_path / "evil.ckpt"
    path.write_bytes(FORMS[form](touched))
    arguments = {
        "export": ["--model", str(path), "--output_dir", str(tmp_path / "out")],
        "generate": ["--model", str(path), "--prompt", "a", "--strategy", "autoregressive"],
    }.get(verb, ["--config", str(config), "--ckpt_path", str(path)])
    assert cli(monkeypatch, verb, *arguments) == 2
    assert not touched.exists()
    assert "evil.ckpt" in capsys.readouterr().err


def evil_directory(folder, touched, *, where):
    """A checkpoint directory of FSDP2 with the payload in one of its files."""
    folder.mkdir()
    plain = io.BytesIO()
    architecture = json.loads(make_module().config.to_json_string(use_diff=False))
    versions = {"pytorch-lightning_version": lightning.__version__, "hf_config": architecture}
    torch.save(versions | {"optimizer_states": [], "global_step": 1, "loops": {}, "epoch": 0}, plain)
    entries, places = {}, {}
    if where == "shards":  # a value that is no tensor is pickled there, and torch's own reader unpickles it
        for name, _ in make_reference().named_parameters():
            key = f"state_dict.model.{name}"
            entries[key] = metadata.BytesStorageMetadata()
            content = as_torch_file(touched)
            places[metadata.MetadataIndex(key)] = filesystem._StorageInfo("__0_0.distcp", 0, len(content))
            (folder / "__0_0.distcp").write_bytes(content)
    described = pickle.dumps(metadata.Metadata(entries, storage_data=places))
    (folder / METADATA_FILE).write_bytes(pickle.dumps(Payload(touched)) if where == METADATA_FILE else described)
    (folder / "meta.pt").write_bytes(as_torch_file(touched) if where == "meta.pt" else plain.getvalue())
    write_manifest(folder)
    return folder


def make_reference():
    module = make_module()
    module.configure_model()
    return module.model


WHERE = [METADATA_FILE, "meta.pt", "shards"]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("verb", ["fit", "validate", "generate", "consolidate"])
def test_a_checkpoint_directory(config, touched, tmp_path, monkeypatch, capsys, where, verb):
    path = evil_directory(tmp_path / "evil.ckpt", touched, where=where)
    arguments = {
        "generate": ["--model", str(path), "--prompt", "a", "--strategy", "autoregressive"],
        "consolidate": ["--ckpt_path", str(path), "--output", str(tmp_path / "out.ckpt")],
    }.get(verb, ["--config", str(config), "--ckpt_path", str(path)])
    status = cli(monkeypatch, verb, *arguments)
    message = capsys.readouterr().err
    assert not touched.exists()
    if (verb, where) != ("consolidate", "shards"):  # what is no tensor is left out
        assert status == 2
        assert where == "shards" or "evil.ckpt" in message


def resume_sharded(root, path, strategy=MeshStrategy, refusal=CheckpointError):
    trainer = make_trainer(root, max_steps=1, callbacks=[], devices=2, strategy=strategy())
    with pytest.raises(refusal) as caught:
        trainer.fit(make_module(), datamodule=make_data(root, num_lanes=2), ckpt_path=str(path))
    return str(caught.value)


@pytest.mark.distributed
@pytest.mark.parametrize("where", WHERE)
def test_a_checkpoint_directory_that_ranks_resume_from(touched, tmp_path, where):
    path = evil_directory(tmp_path / "evil.ckpt", touched, where=where)
    for message in run_ranks(resume_sharded, tmp_path, path):
        assert "evil.ckpt" in message
    assert not touched.exists()


@pytest.mark.distributed
def test_lightning_s_own_strategy_runs_what_the_metadata_holds(touched, tmp_path):
    """So the test above can fail."""
    path = evil_directory(tmp_path / "evil.ckpt", touched, where=METADATA_FILE)
    run_ranks(resume_sharded, tmp_path, path, lambda: ModelParallelStrategy(2, 1), CheckpointException)
    assert touched.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_of_a_model(config, touched, tmp_path, monkeypatch, capsys, name):
    model = save_model(tmp_path / "model")
    for weights in model.glob("*.safetensors*"):
        weights.unlink()
    (model / name).write_bytes(as_torch_file(touched))
    for pretrained in (model, model / name):
        assert cli(monkeypatch, "fit", "--config", str(config), "--model.pretrained", str(pretrained),
                   "--model.config", "null") == 2  # fmt: skip
        assert not touched.exists()
        assert "pretrained" in capsys.readouterr().err


def write_code(folder, touched, *, kinds):
    """Python code beside a model or tokenizer, which its configs ask to run."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(touched)!r})\nclass Evil: pass\n")
    for file, classes in kinds.items():
        content = json.loads((folder / file).read_text())
        content["auto_map"] = dict.fromkeys(classes, "evil.Evil")
        content.pop("tokenizer_class", None)
        (folder / file).write_text(json.dumps(content | {"model_type": "evil"} if file == "config.json" else content))


def test_code_of_a_model(config, touched, tmp_path, monkeypatch):
    model = save_model(tmp_path / "model")
    write_code(model, touched, kinds={"config.json": ["AutoConfig", "AutoModelForCausalLM"]})
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks on a terminal
    options = ["--model.pretrained", str(model), "--model.config", "null"]
    assert cli(monkeypatch, "fit", "--config", str(config), *options) == 2
    assert cli(monkeypatch, "generate", "--model", str(model), "--prompt", "a", "--strategy", "autoregressive") == 2
    assert not touched.exists()


def test_code_of_a_tokenizer(config, touched, tmp_path, monkeypatch, capsys):
    model = save_model(tmp_path / "model")
    write_code(model, touched, kinds={"tokenizer_config.json": ["AutoTokenizer"]})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for file in model.glob("*.py"):
        assert file.name == "evil.py"
    cli(monkeypatch, "data", "--config", str(config), "--data.tokenizer", str(model), "--num_batches", "1")
    assert not touched.exists()
    assert "Traceback" not in capsys.readouterr().err


def test_a_tokenizer_in_a_checkpoint_writes_nowhere_else(tmp_path):
    outside = tmp_path / "outside"
    for name in (str(outside), f"../../../../../../../..{outside}"):
        with pytest.raises(ValueError, match="not the name of a file"):
            tokenizer_from_files({"tokenizer.json": "{}", name: "text"})
    assert not outside.exists()


# -- caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_cache_of_a_corpus(config, touched, tmp_path, monkeypatch, capsys, form):
    arguments = ["data", "--config", str(config), "--num_batches", "2"]
    assert cli(monkeypatch, *arguments) == 0
    expected = capsys.readouterr().out
    cached = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert cached
    for file in cached:
        file.write_bytes(FORMS[form](touched))
    assert cli(monkeypatch, *arguments) in (0, 2)
    assert not touched.exists()
    assert expected
    assert "Traceback" not in capsys.readouterr().err
