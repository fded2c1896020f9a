"""`layerskip plan`: any config of `fit`, without weights, data or GPU."""

import json
from pathlib import Path

import pytest
import yaml

from tests.support.runs import cli
from tests.support.tiny_models import tiny_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """Run the verb on a run of a tiny model, whose data do not exist; its standard streams."""
    config = {
        "model": {"config": {"class_path": "transformers.LlamaConfig", "init_args": tiny_config().to_diff_dict()}},
        "layer_dropout": {"max_dropout_rate": 0.1},
        "early_exit": {"curriculum": "rotational", "rotation_interval": 2, "early_exit_scale": 1.0},
        "data": {
            "class_path": "datamodules.TextCodeDataModule",
            "init_args": {
                "sources": {"code": {"kind": "files", "path": "nowhere"}},
                "tokenizer": "nowhere_either",
                "seq_len": 64,
                "batch_size": 4,
            },
        },
        "trainer": {
            "max_steps": 1000,
            "accelerator": "gpu",
            "num_nodes": 2,
            "devices": 8,
            "precision": "bf16-mixed",
            "accumulate_grad_batches": 3,
            "logger": False,
        },
    }
    for name in ("model_type", "transformers_version", "dtype"):
        config["model"]["config"]["init_args"].pop(name, None)
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)

    def run(*arguments, status=0, config="config.yaml"):
        capsys.readouterr()
        assert cli(monkeypatch, "plan", "--config", str(config), *arguments) == status
        return capsys.readouterr()

    return run


@pytest.fixture
def plan_json(plan):
    return lambda *arguments, **settings: json.loads(plan(*arguments, "--json", **settings).out)


MACHINE = ("--device_memory", "80GB", "--peak_flops", "989e12")
FSDP2 = (
    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.init_args.tensor_parallel_size=1",
)


def test_it_says_what_the_run_takes_and_leaves_nothing_behind(plan_json, tmp_path):
    found = plan_json(*MACHINE, "--utilisation", "0.5")
    parameters = found["parameters"]
    assert parameters["total"] == parameters["embeddings"] + sum(parameters["blocks"]) + 32
    assert (parameters["tied"], parameters["head"]) == (True, 0)
    assert found["recipe"]["tokens"] == 2 * 8 * 3 * 4 * 64 * 1000
    assert (found["dtype"], found["autocast"], found["layout"]["strategy"]) == ("float32", "bfloat16", "ddp")
    assert found["memory"]["weights"] == 4 * parameters["total"] == found["export_bytes"]
    assert found["checkpoint_bytes"] == 3 * found["export_bytes"]
    assert found["flops"] == pytest.approx(1000 * found["step_flops"])
    assert found["hours"] == pytest.approx(found["flops"] / (989e12 * 0.5 * 16) / 3600)
    assert found["fits"]
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_machines_and_any_setting_of_fit_can_be_given(plan_json):
    one = plan_json("--num_nodes", "1", "--devices", "1")
    many = plan_json("--num_nodes", "4", "--devices", "2", "--data.batch_size", "8")
    assert (one["layout"]["strategy"], one["recipe"]["world_size"]) == ("single", 1)
    assert (many["layout"]["strategy"], many["recipe"]["world_size"]) == ("ddp", 8)
    assert many["recipe"]["tokens"] == 16 * one["recipe"]["tokens"]
    assert many["step_flops"] == pytest.approx(16 * one["step_flops"], rel=1e-6)
    assert one["fits"] is one["hours"] is None


def test_fsdp2_spreads_weights_over_all_devices(plan_json):
    whole, spread = plan_json("--devices", "4"), plan_json("--devices", "4", *FSDP2)
    assert spread["layout"] == {"strategy": "fsdp2", "shards": 8, "bucket_views": False}
    assert spread["memory"]["weights"] < 0.15 * whole["memory"]["weights"]
    assert spread["memory"]["activations"] == whole["memory"]["activations"]
    assert spread["checkpoint_bytes"] == whole["checkpoint_bytes"]


@pytest.mark.parametrize(
    ("precision", "bytes_a_weight", "autocast"),
    [("32", 4, None), ("bf16-mixed", 4, "bfloat16"), ("bf16-true", 2, None)],
)
def test_memory_follows_the_precision(plan_json, precision, bytes_a_weight, autocast):
    found = plan_json(f"--trainer.precision={precision}")
    assert found["memory"]["weights"] == bytes_a_weight * found["parameters"]["total"]
    assert found["autocast"] == autocast
    assert (found["memory"]["weight_copies"] > 0) == (autocast is not None)
    assert ("trainer.precision" in str(found["departures"])) == (precision == "bf16-true")


def test_of_a_pretrained_model_config_json_alone_is_read(plan_json, plan, tmp_path):
    given = tiny_config(num_layers=6)
    given.architectures = ["LlamaForCausalLM"]
    given.save_pretrained(tmp_path / "my_llama")
    pretrained = ("--model.config=null", "--model.pretrained", "my_llama")
    found = plan_json(*pretrained)
    assert len(found["parameters"]["blocks"]) == 6
    assert "time_scale" not in str(found["departures"])  # which is for models from scratch
    assert "time_scale" in str(plan_json()["departures"])
    described = plan_json("--model.pretrained", "not/here/yet")
    assert len(described["parameters"]["blocks"]) == 4
    assert "time_scale" not in str(described["departures"])
    (tmp_path / "my_llama" / "config.json").write_text("{")
    assert "error: model.pretrained: got 'my_llama', allowed" in plan(*pretrained, status=2).err


def test_a_person_reads_tables_and_warnings(plan):
    shown = plan("--device_memory", "1MB", "--peak_flops", "1e12").out
    for text in ("4 blocks, each", "tied to the embeddings", "optimizer states", "NO", "hours", "bfloat16 copies"):
        assert text in shown
    assert "warning: layer_dropout.time_scale: constant: from scratch the rate rises" in shown
    assert "(arXiv 2404.16710 section 4.1.1)" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.config=null"], "model.pretrained: got None, allowed a model's directory, or model.config"),
        (["--model.config=null", "--model.pretrained", "no/such/model"], "model.pretrained: got 'no/such/model'"),
        (["--trainer.strategy=fsdp"], "trainer.strategy: got 'fsdp', allowed auto | ddp | ModelParallelStrategy"),
        ([*FSDP2[:1]], "trainer.strategy.init_args.tensor_parallel_size: got 8, allowed 1 for 16 devices"),
        (["--data.seq_len", "1024"], "data.init_args.seq_len: got 1024, allowed 1..512"),
        (["--early_exit.rotation_interval", "5"], "early_exit.rotation_interval: got 5, allowed [1, 4]"),
        (["--trainer.max_steps", "-1"], "model.lr_schedule: got 'cosine', allowed only in a run of known length"),
        (["--early_exit.curriculum=gradual", "--trainer.max_steps", "-1"], "early_exit.curriculum: got 'gradual'"),
        (["--trainer.precision", "transformer-engine"], "trainer.precision: got 'transformer-engine', allowed 64-true"),
        (["--model.optimizer=AdamW", "--model.optimizer.lr=-1"], "optimizer"),
        (["--device_memory", "80 gigs"], "device_memory: got '80 gigs', allowed a size, such as 80GB"),
        (["--utilisation", "1.5"], "utilisation: got 1.5, allowed (0, 1]"),
        (["--devices", "0"], "devices: got 0, allowed [1, inf)"),
        (["--data.foo", "1"], "data.foo: unknown key"),
    ],
)
def test_a_mistake_is_told_in_one_message(plan, arguments, message):
    error = plan(*arguments, status=2).err
    assert message in error
    assert "Traceback" not in error


def test_a_run_without_end_is_planned_by_the_step(plan_json):
    found = plan_json("--trainer.max_steps=-1", "--model.lr_schedule=constant", *MACHINE)
    assert found["recipe"]["tokens"] is found["flops"] is found["hours"] is None
    assert found["seconds_per_step"] > 0


def test_the_quickstart_can_be_planned_from_its_own_folder(plan_json):
    found = plan_json(config=CONFIGS / "quickstart.yaml")
    settings = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())["model"]["config"]["init_args"]
    assert len(found["parameters"]["blocks"]) == settings["num_hidden_layers"]
