"""LoRA under the recipe: adapters alone learn, a killed run goes on, and what is read or exported is merged."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM

from app.checkpoints.weights import open_trained_weights
from app.decoding.settings import DecodingSettings
from app.errors import CheckpointError, ConfigError
from app.generation.loaded_model import load_decoder
from app.model.lora import LoraSettings, add_adapters, merged_shapes, merged_weight
from app.model_files.open import load_pretrained
from app.training.exit_block_settings import ExitBlockSettings
from app.training.module import LayerSkipModule
from callbacks import ThroughputMonitor
from tests.integration.test_resume import StopAfter
from tests.support.decoding import decode
from tests.support.runs import Recorder, cli, curricula, make_data, make_module, make_trainer, write_trained
from tests.unit.spans.test_architectures import ARCHITECTURES, TOKENS, make_model

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 16
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_trained(tmp_path_factory.mktemp("lora"), max_steps=10)


def make_lora(root, *, r=4, alpha=16, target_modules=None, train_norms=False, **settings) -> LayerSkipModule:
    defaults = {"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2), "lr_schedule": "constant"}
    lora = LoraSettings(r, alpha, target_modules, train_norms)
    return LayerSkipModule(pretrained=str(root / "model.ckpt"), peft=lora, **(defaults | settings))


def train(root, folder, *, until=STEPS, ckpt_path=None, **settings):
    """The steps of a run of STEPS up to `until`, its module, and its latest checkpoint."""
    recorder, saver = Recorder(), ModelCheckpoint(dirpath=folder, every_n_train_steps=STEPS // 2, save_top_k=-1)
    trainer = make_trainer(folder, max_steps=STEPS, callbacks=[*curricula(), recorder, saver])
    if until < STEPS:
        trainer.callbacks.append(StopAfter(until))
    module = make_lora(root, **settings)
    trainer.fit(module, datamodule=make_data(root), ckpt_path=ckpt_path)
    return recorder.steps, module, Path(saver.best_model_path)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    return train(root, tmp_path_factory.mktemp("whole"), train_norms=True)


def is_adapter(name):
    return ".lora_A." in name or ".lora_B." in name


def test_adapters_and_norms_alone_learn_under_layer_dropout_and_exits(root, whole, tmp_path):
    steps, module, saved = whole
    untrained = LayerSkipModule.load_from_checkpoint(root / "model.ckpt")
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[], limit_val_batches=1.0)
    before, after = (
        trainer.validate(each, datamodule=make_data(root), verbose=False)[0]["val/loss"] for each in (untrained, module)
    )
    assert after < before - 0.1
    assert any(any(step["dropped"]) for step in steps)
    assert len({step["exits"] for step in steps}) > 1
    start = load_pretrained(str(root / "model.ckpt")).state_dict()
    for name, weight in module.model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        assert weight.requires_grad == (is_adapter(name) or "norm" in name), name
        if not is_adapter(name):
            assert torch.equal(weight, start[plain]) == ("norm" not in name), name
    adapted = {name.split(".")[-4] for name, _ in module.model.named_parameters() if is_adapter(name)}
    assert adapted == {*PROJECTIONS}
    (optimizer,) = torch.load(saved, weights_only=True)["optimizer_states"]
    assert len(optimizer["state"]) == sum(p.requires_grad for p in module.parameters())


def test_norms_stay_frozen_and_other_projections_have_no_adapter_by_choice(root):
    module = make_lora(root, target_modules=["q_proj", "v_proj"])
    module.configure_model()
    trained = [name for name, weight in module.model.named_parameters() if weight.requires_grad]
    assert {name.split(".")[-4] for name in trained} == {"q_proj", "v_proj"}
    torch.rand(1)
    again = make_lora(root, target_modules=["q_proj", "v_proj"])
    again.configure_model()
    assert all(map(torch.equal, module.state_dict().values(), again.state_dict().values()))  # ranks begin alike


def test_a_resumed_run_equals_the_uninterrupted_one(root, whole, tmp_path):
    first, _, saved = train(root, tmp_path, until=STEPS // 2, train_norms=True)
    second, resumed, _ = train(root, tmp_path, ckpt_path=str(saved), train_norms=True)
    steps, module, _ = whole
    assert first + second == steps
    assert all(map(torch.equal, module.state_dict().values(), resumed.state_dict().values()))
    for other in ({"alpha": 8}, {}):  # the last trains no norms
        with pytest.raises(CheckpointError, match=r"holds adapters \{'r': 4, 'alpha': 16.*model.peft gives"):
            train(root, tmp_path, ckpt_path=str(saved), **({"train_norms": True} if other else {}), **other)


def test_a_checkpoint_opens_as_the_merged_model(root, whole, tmp_path):
    _, module, saved = whole
    module.eval()
    tokens = torch.arange(4, 40)[None]
    with torch.no_grad():
        expected = module.model(tokens).logits
        merged = load_pretrained(str(saved)).eval()(tokens).logits
        before = load_pretrained(str(root / "model.ckpt")).eval()(tokens).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert (before - expected).abs().max() > 0.1
    content = torch.load(saved, weights_only=True)
    content["lora"] = {"r": 4, "strength": 3}
    torch.save(content, damaged := tmp_path / "damaged.ckpt")
    with pytest.raises(CheckpointError, match="its 'lora' is damaged"):
        open_trained_weights(damaged)
    opened = load_decoder(str(saved), dtype="auto", device="cpu").decoder
    settings = DecodingSettings(max_new_tokens=12, exit_layer=2, num_draft_tokens=2)
    decoded = [
        decode(decoder, range(4, 12), strategy=strategy, settings=settings).tokens
        for decoder in (opened, module.exitable_decoder())  # the latter is that of validation
        for strategy in ("self_speculative", "autoregressive")
    ]
    assert decoded == [decoded[0]] * 4


@pytest.mark.parametrize("name", ["llama, biases", "qwen2", "qwen3", "olmo2", "phi3", "gemma3"])
def test_every_architecture_is_merged_and_tells_its_norms(name):
    kind, extra = ARCHITECTURES[name]
    model = make_model(kind, **extra).eval()
    plain = {name: weight.clone() for name, weight in model.state_dict().items()}
    add_adapters(model, LoraSettings(r=2, train_norms=True), seed=0)
    for name, weight in model.named_parameters():
        is_norm = weight.dim() == 1 and not name.endswith(".bias")
        assert weight.requires_grad == (is_adapter(name) or is_norm), name
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.1)
    weights, again = model.state_dict(), make_model(kind, **extra).eval()
    assert {name: (weight.shape, weight.dtype) for name, weight in plain.items()} == merged_shapes(weights)
    again.load_state_dict({name: merged_weight(weights, name, scale=16) for name in plain})
    with torch.no_grad():
        expected, merged, before = (each(TOKENS).logits for each in (model, again, make_model(kind, **extra).eval()))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PeftModel
def test_an_export_is_merged_and_the_adapter_is_kept_in_peft_s_own_format(root, whole, tmp_path, monkeypatch, capsys):
    _, _, saved = whole
    merged, adapter, base = (str(tmp_path / name) for name in ("merged", "adapter", "base"))
    export = ["export", "--model", str(saved), "--output_dir", merged]
    for wrong, message in (
        ([*export, "--adapter_dir", merged], "allowed a directory beside output_dir"),
        (
            ["export", "--model", str(root / "model.ckpt"), "--output_dir", merged, "--adapter_dir", adapter],
            "allowed null for a model without LoRA",
        ),
    ):
        assert cli(monkeypatch, *wrong) == 2
        assert message in capsys.readouterr().err
        assert not Path(merged).exists()
    for _ in range(2):  # an export replaces an earlier one
        assert cli(monkeypatch, *export, "--adapter_dir", adapter) == 0
    assert cli(monkeypatch, "export", "--model", str(root / "model.ckpt"), "--output_dir", base) == 0
    tokens = torch.arange(4, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(merged)(tokens).logits
        before = plain(tokens).logits
        adapted = PeftModel.from_pretrained(plain, adapter)(tokens).logits
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-5)
    assert (before - expected).abs().max() > 0.1


def test_utilisation_counts_no_gradients_of_frozen_weights(root):
    flops = []
    for module in (make_lora(root, r=1), LayerSkipModule(pretrained=str(root / "model.ckpt"))):
        monitor = ThroughputMonitor(peak_flops=1e12)
        monitor.on_train_batch_start(None, module, {"input_ids": torch.zeros(4, 24)}, 0)
        flops.append(sum(monitor._costs.block_flops))
    assert 0.65 < flops[0] / flops[1] < 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"peft.r: got 0, allowed \[1"),
        ({"alpha": 0}, r"peft.alpha: got 0, allowed \[1"),
        ({"exit_blocks": ExitBlockSettings({1: 1})}, "peft: got 'LoRA', allowed null with model.exit_blocks"),
        ({"compile_blocks": True}, "compile_blocks: got True, allowed false with model.peft"),
        ({"target_modules": ["lm_head"]}, r"peft.target_modules: got \['lm_head'\], allowed one or more of down_proj"),
    ],
)
def test_what_does_not_go_with_lora_is_refused(root, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_lora(root, **settings).configure_model()


def test_lora_needs_a_trained_model_and_the_peft_library(root, monkeypatch):
    with pytest.raises(ConfigError, match=r"config: got 'llama', allowed no model.config: LoRA"):
        make_module(peft=LoraSettings()).configure_model()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"peft: got 'LoRA', .*pip install 'layerskip-lightning\[peft\]'"):
        make_lora(root)


def test_the_commands_plan_train_and_measure_adapters(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    corpus = {"code": {"kind": "files", "path": str(root / "corpus")}}
    data = {"sources": corpus, "seq_len": 24, "batch_size": 4, "validation_share": 0.2, "validation_rows": 8}
    saver = {"class_path": "callbacks.LastCheckpoint", "init_args": {"every_n_train_steps": 2}}
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "x", "version": ""}}
    settings = {
        "model": {"pretrained": str(root / "model.ckpt")},
        "data": {"class_path": "datamodules.TextCodeDataModule", "init_args": data},
        "trainer": {
            "max_steps": 2,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "accelerator": "cpu",
            "logger": logger,
            "callbacks": [saver],
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    Path("x.yaml").write_text(yaml.safe_dump(settings))
    stacked = [
        "--config",
        "x.yaml",
        "--config",
        str(CONFIGS / "variant/lora.yaml"),
        "--early_exit.curriculum",
        "gradual",
    ]
    for arguments, message in (
        (["--model.peft.r", "0"], "model.peft.r: got 0, allowed [1"),
        (["--model.peft.rank", "2"], "model.peft.rank: unknown key"),
        (["--model.peft.target_modules", "[embed_tokens]"], "model.peft.target_modules: got ['embed_tokens'], allowed"),
        (["--trainer.strategy", "app.training.strategy.MeshStrategy"], "trainer.strategy: got 'MeshStrategy', allowed"),
        (["--model.exit_blocks.exits", "{1: 1}"], "model.peft: got 'LoRA', allowed null with model.exit_blocks"),
    ):
        assert cli(monkeypatch, "fit", *stacked, *arguments) == 2
        assert message in capsys.readouterr().err
        assert not Path("runs").exists()
    assert cli(monkeypatch, "plan", *stacked, "--json", "--devices", "2", "--device_memory", "1200KB") == 0
    plan = json.loads(capsys.readouterr().out)
    assert cli(monkeypatch, "fit", *stacked) == 0
    assert cli(monkeypatch, "validate", "--config", "runs/x/config.yaml", "--ckpt_path", "last") == 0
    assert cli(monkeypatch, "fit", "--config", "runs/x/config.yaml", "--ckpt_path", "last", "--model.peft", "null") == 2
    assert "holds adapters {'r': 16" in capsys.readouterr().err
    assert cli(monkeypatch, "export", "--model", "runs/x/checkpoints/last.ckpt", "--output_dir", "out") == 0
    assert "| trained | LoRA adapters, merged here: r 16, alpha 32 |" in Path("out/README.md").read_text()
    content = torch.load("runs/x/checkpoints/last.ckpt", weights_only=True)
    adapters = [weight for name, weight in content["state_dict"].items() if is_adapter(name)]
    trained = sum(adapter.numel() for adapter in adapters)
    total = sum(weight.numel() for name, weight in content["state_dict"].items() if "lm_head" not in name)  # tied
    moments = [
        state[key] for state in content["optimizer_states"][0]["state"].values() for key in ("exp_avg", "exp_avg_sq")
    ]
    parameters, memory = plan["parameters"], plan["memory"]
    assert (parameters["trained"], parameters["total"], memory["weights"]) == (trained, total, 4 * total)
    assert memory["gradients"] == 4 * trained
    assert memory["optimizer_states"] == sum(moment.nbytes for moment in moments) == 8 * trained
    assert plan["changes_that_fit"]
    assert not any("fsdp2" in change["options"] for change in plan["changes_that_fit"])  # which adapters do not run on
    assert 0.4 < plan["recomputation_cost"] < 0.5  # a forward is a half, without gradients of frozen weights
    assert plan["export_bytes"] == 4 * (total - trained)
