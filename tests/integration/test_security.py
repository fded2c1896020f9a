"""Configs from elsewhere: a class path that is not allowed is refused before anything is imported."""

import sys

import pytest
import yaml

from tests.support.runs import cli, write_corpus
from tests.support.stream_runs import write_config


@pytest.fixture
def config(tmp_path):
    sources = {"code": {"kind": "files", "path": str(write_corpus(tmp_path / "corpus"))}}
    return write_config(tmp_path, sources, max_steps=2, checkpoint_every=2)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A package that says so when it is imported."""
    package, touched = tmp_path / "trap_package", tmp_path / "touched"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"import pathlib\nfrom lightning.pytorch import Callback\npathlib.Path({str(touched)!r}).touch()\n"
        "class Trap(Callback): pass\n"
        "def function(*args, **kwargs): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield touched
    sys.modules.pop("trap_package", None)


def with_setting(config, path, value):
    """The config with one setting replaced, or put into a list that is there."""
    node = content = yaml.safe_load(config.read_text())
    *above, last = path.split(".")
    for key in above:
        node = node.setdefault(key, {})
    node[last] = node[last] + [value] if isinstance(node.get(last), list) else value
    file = config.with_name("changed.yaml")
    file.write_text(yaml.safe_dump(content))
    return file


# -- class paths -------------------------------------------------------------------------------------------------------

TRAP = {"class_path": "trap_package.Trap"}
PLACES = {
    "trainer.callbacks": TRAP,
    "trainer.logger": TRAP,
    "trainer.strategy": TRAP,
    "trainer.plugins": TRAP,
    "trainer.profiler": TRAP,
    "model.optimizer": {"class_path": "trap_package.function"},
    "model.config": TRAP,
    "data": TRAP,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_class_of_another_package_is_refused_before_it_is_imported(config, trap, monkeypatch, capsys, place):
    status = cli(monkeypatch, "fit", "--config", str(with_setting(config, place, PLACES[place])))
    message = capsys.readouterr().err
    assert status == 2
    assert not trap.exists()
    assert f"error: {place}: got trap_package." in message
    assert "add --allowed_classes+ trap_package to the command line" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("setting", ["strategy", "accelerator", "profiler", "plugins"])
@pytest.mark.parametrize("form", ["--trainer.{}={}", "--trainer.{} {}"])
def test_the_command_line_is_told_the_same_of_settings_that_may_be_names(
    config, trap, monkeypatch, capsys, setting, form
):
    option = form.format(setting, '{"class_path":"trap_package.Trap"}').split(" ")
    assert cli(monkeypatch, "fit", "--config", str(config), *option) == 2
    assert not trap.exists()
    assert f"error: trainer.{setting}: got trap_package.Trap, allowed a class of this app" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["validate", "test", "predict", "data", "plan"])
def test_every_verb_that_takes_a_config_refuses_it(config, trap, monkeypatch, capsys, verb):
    status = cli(monkeypatch, verb, "--config", str(with_setting(config, "trainer.callbacks", TRAP)))
    assert (status, trap.exists()) == (2, False)
    assert "trainer.callbacks: got trap_package.Trap" in capsys.readouterr().err


DANGEROUS = {  # and where the message says that it is defined
    "os.system": None,
    "subprocess.Popen": None,
    "builtins.exec": None,
    "torch.load": None,
    "torch.hub.load": None,
    "torch.utils.cpp_extension.load": None,
    "transformers.pipeline": None,
    "transformers.AutoModel.from_pretrained": None,
    "transformers.AutoConfig.from_pretrained": None,
    "transformers.models.auto.modeling_auto.AutoModelForCausalLM.from_pretrained": None,
    "lightning.pytorch.LightningModule.load_from_checkpoint": None,
    "app.cli.main.main": None,
    "jsonargparse.set_parsing_settings": None,
    # Reached through a module that is allowed.
    "lightning.pytorch.callbacks.model_checkpoint.shutil.rmtree": "shutil.rmtree",
    "lightning.pytorch.strategies.launchers.subprocess_script.subprocess.Popen": "subprocess.Popen",
    "lightning.pytorch.plugins.TorchCheckpointIO": "lightning.fabric.plugins.io.torch_io.TorchCheckpointIO",
    "datamodules.loading.cache.tempfile.TemporaryDirectory": "tempfile.TemporaryDirectory",
}


@pytest.mark.parametrize("path", DANGEROUS)
def test_what_runs_code_reads_pickles_or_removes_files_cannot_be_named(config, monkeypatch, capsys, path):
    """An optimizer may be any callable, by its type."""
    optimizer = {"class_path": path, "init_args": {}}
    status = cli(monkeypatch, "data", "--config", str(with_setting(config, "model.optimizer", optimizer)))
    assert status == 2
    name = DANGEROUS[path] or path
    assert f"error: model.optimizer: got {name}, allowed a class of this application" in capsys.readouterr().err


def test_a_config_cannot_allow_classes_to_itself(config, trap, monkeypatch, capsys):
    changed = with_setting(config, "trainer.callbacks", TRAP)
    changed = with_setting(changed, "allowed_classes", ["trap_package"])
    assert cli(monkeypatch, "data", "--config", str(changed)) == 2
    assert not trap.exists()
    assert "allowed_classes" in capsys.readouterr().err


def test_a_class_path_inside_free_settings_is_refused_too(config, trap, monkeypatch):
    strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"ddp_comm_hook": TRAP}}
    assert cli(monkeypatch, "data", "--config", str(with_setting(config, "trainer.strategy", strategy))) == 2
    assert not trap.exists()


def test_help_on_a_class_imports_nothing_else(trap, monkeypatch):
    assert cli(monkeypatch, "fit", "--trainer.logger.help", "trap_package.Trap") == 2
    assert not trap.exists()


def test_the_command_line_allows_a_package_and_every_architecture_is_allowed(config, trap, monkeypatch):
    changed = with_setting(config, "trainer.callbacks", TRAP)
    arguments = ["--config", str(changed), "--num_batches", "1", "--allowed_classes+", "trap_package."]
    assert cli(monkeypatch, "data", *arguments) == 0
    assert trap.exists()
    qwen = {"class_path": "transformers.Qwen3Config", "init_args": {"vocab_size": 300, "num_hidden_layers": 4}}
    changed = with_setting(config, "model.config", qwen)
    assert cli(monkeypatch, "data", "--config", str(changed), "--num_batches", "1") == 0


def test_what_cannot_be_a_package_is_refused(config, monkeypatch, capsys):
    assert cli(monkeypatch, "data", "--config", str(config), "--allowed_classes+", "os;system") == 2
    assert "--allowed_classes+: got 'os;system', allowed a package" in capsys.readouterr().err
