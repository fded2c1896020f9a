"""`layerskip plan`: any config of `fit`, without weights, data or GPU."""

import json
import re
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
    assert spread["layout"] == {"strategy": "fsdp2", "shards": 8, "bucket_views": False, "gathers_cast": True}
    assert spread["memory"]["weights"] < 0.15 * whole["memory"]["weights"]
    assert spread["memory"]["weight_copies"] == 0 < whole["memory"]["weight_copies"]  # gathered in bfloat16 instead
    assert spread["checkpoint_bytes"] == whole["checkpoint_bytes"]


@pytest.mark.parametrize(
    ("precision", "bytes_a_weight"),
    [("32", 4), ("bf16-true", 2)],
)
def test_memory_follows_the_precision(plan_json, precision, bytes_a_weight):
    found = plan_json(f"--trainer.precision={precision}")
    assert found["memory"]["weights"] == bytes_a_weight * found["parameters"]["total"]
    assert found["autocast"] is None
    assert found["memory"]["weight_copies"] == 0
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
    assert "error: model.pretrained: got 'models/not', allowed a Hugging Face" in (
        plan("--model.config=null", "--model.pretrained", "models/not", status=2).err
    )
    (tmp_path / "my_llama" / "config.json").write_text("{")
    assert "error: model.pretrained: got 'my_llama', allowed" in plan(*pretrained, status=2).err


def test_the_order_that_the_message_recommends_plans_a_model_that_is_continued(plan, plan_json, tmp_path):
    given = json.loads((tmp_path / "config.yaml").read_text())
    architecture = {"model": {"pretrained": None, "config": given["model"].pop("config")}}
    given["model"]["pretrained"] = "models/not_here_yet"
    (tmp_path / "architecture.yaml").write_text(json.dumps(architecture))
    (tmp_path / "experiment.yaml").write_text(json.dumps(given))
    told = "give its architecture before the file that continues it: --config configs/model/NAME.yaml --config ..."
    assert told in plan(config="experiment.yaml", status=2).err
    found = plan_json("--config", "experiment.yaml", config="architecture.yaml")
    assert not found["recipe"]["from_scratch"]
    assert "time_scale" not in str(found["departures"])
    swapped = plan("--config", "architecture.yaml", config="experiment.yaml").out  # as fit, from scratch
    assert "Parameters, drawn at random" in swapped


def write_config(folder, **settings):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    return ("--model.config=null", "--model.pretrained", str(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "t5"}, "got 'T5Config', allowed a causal LM"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, "dequantize it with"),
        ({"model_type": "its_own", "auto_map": {"AutoConfig": "its.Config"}}, "it brings Python code of its own"),
        ({"model_type": "mixtral"}, "got 'mixtral with num_local_experts 8', allowed a model without experts"),
    ],
)
def test_a_model_that_fit_refuses_or_plan_cannot_count_is_refused_in_one_line(plan, tmp_path, settings, message):
    error = plan(*write_config(tmp_path / "odd", **settings), status=2).err.split("error: ")[1]
    assert message in error
    assert "yet" not in error  # it is here
    assert error.count("\n") == 1


def test_a_person_reads_tables_and_warnings(plan):
    shown = plan("--device_memory", "10KB", "--peak_flops", "1e12", "--data.batch_size", "1").out
    for text in (
        "4 blocks, each",
        "tied to the embeddings",
        "optimizer states",
        "NO",
        "time x devices",
        "bfloat16 cop",
        "this run",
    ):
        assert text in shown
    assert "It does not fit, nor with a smaller batch, checkpointing or FSDP2: take larger devices" in shown
    assert not re.search(r"\b0(\.0+)? (KB|MB|GB|hours)", shown)
    assert "with recomputation" not in shown
    assert "warning: layer_dropout.time_scale: constant: from scratch the rate rises" in shown
    assert "(arXiv 2404.16710 section 4.1.1)" in shown


def peaks(found):
    return found["memory"]["peak"], found["memory"]["peak_checkpointed"]


def test_what_would_fit_is_told_and_does(plan_json):
    options = ("--num_nodes", "1", "--devices", "2", "--data.seq_len", "512")
    plain, checkpointed = peaks(plan_json(*options, "--device_memory", "1GB"))
    memory = ("--device_memory", f"{0.6 * plain / 1e3 / 0.9:.3f}KB")  # a tenth stays free
    found = plan_json(*options, *memory)
    assert not found["fits"]
    ways = {change["options"]: change["peak"] for change in found["changes_that_fit"]}
    assert len(ways) == 3
    assert any(way.startswith("--data.batch_size") for way in ways)
    assert any(way.startswith("--model.activation_checkpointing true") for way in ways)
    for way in sorted(ways)[:2]:  # a smaller batch, and FSDP2; the third is a smaller batch with checkpointing
        given = way.replace("configs/", f"{CONFIGS}/").split()
        changed = plan_json(*options, *memory, *given)
        checkpointing = changed["checkpointing"]
        assert peaks(changed)[checkpointing] == ways[way] <= 0.6 * plain
        assert changed["recipe"]["tokens_per_step"] == found["recipe"]["tokens_per_step"]
    assert checkpointed < plain


def test_flops_and_seconds_are_told_of_the_same_work(plan, plan_json):
    options = ("--model.activation_checkpointing=true", "--peak_flops", "1e12", "--utilisation", "1")
    found, shown = plan_json(*options), plan(*options).out
    computed = found["step_flops"] * (1 + found["recomputation_cost"])
    assert found["seconds_per_step"] == pytest.approx(computed / 1e12 / 16)
    rows = dict(re.findall(r"│ +(\S[^│]*?) │ +([^│ ]+)", shown.split("Work")[1]))
    assert rows["FLOPs a step, mean"] == f"{found['step_flops']:.3e}"
    assert rows["FLOPs a step, with recomputation"] == f"{computed:.3e}"
    assert rows["FLOPs in all, with recomputation"] == f"{1000 * computed:.3e}"
    assert rows["seconds a step, with recomputation"] == f"{found['seconds_per_step']:.3g}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.config=null"], "model.pretrained: got None, allowed a model's directory, or model.config"),
        (["--model.config=null", "--model.pretrained", "no/such/model"], "model.pretrained: got 'no/such/model'"),
        (["--trainer.strategy=fsdp"], "trainer.strategy: got 'fsdp', allowed auto | ddp | MeshStrategy"),
        (
            [*FSDP2, "--trainer.strategy.init_args.tensor_parallel_size=8"],
            "trainer.strategy.init_args.tensor_parallel_size: got 8, allowed 1",
        ),
        (["--data.seq_len", "1024"], "data.init_args.seq_len: got 1024, allowed 1..512"),
        (["--trainer.max_steps", "-1"], "model.lr_schedule: got 'cosine', allowed only in a run of known length"),
        (["--trainer.precision", "transformer-engine"], "trainer.precision: got 'transformer-engine', allowed 64-true"),
        (["--model.optimizer=AdamW", "--model.optimizer.lr=-1"], "optimizer"),
        (["--device_memory", "80"], "device_memory: got '80', allowed a size, such as 80GB"),
        (["--utilisation", "1.5"], "utilisation: got 1.5, allowed (0, 1]"),
        (["--devices", "0"], "devices: got 0, allowed [1, inf)"),
        (["--peak_flops=312T"], "error: peak_flops: got 312T, allowed float (a finite number)"),
        (["--device_memory", "-5GB"], "error: device_memory: got '-5GB', allowed a size, such as 80GB"),
        (["--device_memory"], "error: device_memory: expected one argument"),
        (["--foo", "1"], "(options: layerskip plan --help)"),
    ],
)
def test_a_mistake_is_told_in_one_message(plan, arguments, message):
    error = plan(*arguments, status=2).err
    assert message in error
    assert "Traceback" not in error


OF_EXIT_BLOCKS = ("--config", str(CONFIGS / "variant/exit_block.yaml"), "--model.exit_blocks.exits", "{1: 1, 2: 0}")


def test_exit_blocks_are_planned_with_the_model_frozen(plan, plan_json, tmp_path):
    found = plan_json(*OF_EXIT_BLOCKS, "--devices", "1", "--num_nodes", "1")
    block = found["parameters"]["blocks"][0]
    assert found["parameters"]["trained"] == block + 2 * 32 == found["exit_blocks"]["parameters"]
    assert found["memory"]["gradients"] == 4 * (block + 2 * 32)
    assert 0 < found["exit_blocks"]["pass_flops"] < found["step_flops"]
    (file := tmp_path / "ids.json").write_text(json.dumps([*range(60)]))
    fewer = plan_json(
        *OF_EXIT_BLOCKS, "--model.exit_blocks.vocabulary", str(file), "--devices", "1", "--num_nodes", "1"
    )
    assert fewer["step_flops"] < found["step_flops"]
    shown = plan(*OF_EXIT_BLOCKS, "--device_memory", "10KB", "--peak_flops", "1e12").out
    assert "of these the frozen model's" in shown
    assert "activation" not in shown.replace("activations", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer_dropout.max_dropout_rate", "0.1"], "layer_dropout.max_dropout_rate: got 0.1, allowed 0.0 with"),
        (["--early_exit.curriculum=rotational"], "early_exit.curriculum: got 'rotational', allowed none with"),
        (["--model.activation_checkpointing=true"], "activation_checkpointing: got True, allowed false with"),
        (["--model.peft", "{}"], "peft: got 'LoRA', allowed null with model.exit_blocks"),
        ([*FSDP2], "trainer.strategy: got 'MeshStrategy', allowed one device or ddp with model.exit_blocks"),
        (["--model.exit_blocks.exits", "{4: 0}"], "exit_blocks.exits: got 4, allowed [1, 3]"),
        (["--model.exit_blocks.vocabulary", "none.json"], "none.json: no list of token ids can be read from it"),
    ],
)
def test_what_fit_refuses_of_exit_blocks_plan_refuses(plan, arguments, message):
    assert message in plan(*OF_EXIT_BLOCKS, *arguments, status=2).err


def test_a_run_without_end_is_planned_by_the_step(plan_json):
    found = plan_json("--trainer.max_steps=-1", "--model.lr_schedule=constant", *MACHINE)
    assert found["recipe"]["tokens"] is found["flops"] is found["hours"] is None
    assert found["seconds_per_step"] > 0


def test_the_quickstart_can_be_planned_from_its_own_folder(plan_json):
    found = plan_json(config=CONFIGS / "quickstart.yaml")
    settings = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())["model"]["config"]["init_args"]
    assert len(found["parameters"]["blocks"]) == settings["num_hidden_layers"]
