"""The paper's experiments: every hyperparameter against a table written by hand, and each trains when shrunk."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace
from transformers import LlamaConfig

from app.cli.strategies import mesh_of
from app.cli.train import make_cli
from app.layerskip.schedules import dropout_rates
from app.model.early_exit import EarlyExitModel
from app.model_files.open import build_model
from callbacks import (
    DropoutAgreementCheck,
    EarlyExitCurriculum,
    LayerDropoutCurriculum,
    ParseValidation,
    SelfSpeculativeValidation,
)
from tests.support.runs import Built, cli, write_corpus
from tests.support.topv2_folders import write_folder

CONFIGS = Path(__file__).parents[2] / "configs"

# arXiv 2404.16710, section 5 and Tables 8 to 10; context 4096. None: the paper does not give it.
FIELDS = (
    "model", "layers", "width", "heads", "p_max", "time", "curriculum", "R", "e_scale", "lr", "batch", "steps",
    "devices", "tokens",
)  # fmt: skip
PAPER = {
    name: dict(zip(FIELDS, row, strict=True))
    for name, *row in [
        ("llama2_7b_continual",
         "llama2_7b", 32, 4096, 32, 0.1, "constant", "rotational", 8, 0.2, 3e-5, 4, 50_000, 64, 52e9),
        ("llama2_13b_continual",
         "llama2_13b", 40, 5120, 40, 0.1, "constant", "rotational", 39, 0.1, 2e-5, 4, 50_000, 64, 52e9),
        ("llama3_8b_continual",
         "llama3_8b", 32, 4096, 32, 0.1, "constant", "rotational", 8, 0.1, None, None, None, None, 419e9),
        ("llama3_2_1b_continual",
         "llama3_2_1b", 16, 2048, 32, 0.1, "constant", "rotational", 8, 0.1, None, None, None, None, 839e9),
        ("llama2_1_5b_scratch",
         "llama2_1_5b", 24, 2048, 16, 0.1, "exponential", "rotational", 23, 0.2, 8e-4, 4, 50_000, 32, 26e9),
        ("llama2_7b_scratch",
         "llama2_7b", 32, 4096, 32, 0.2, "exponential", "rotational", 31, 0.2, 8e-4, 4, 50_000, 32, 26e9),
        ("llama1_7b_code",
         "llama1_7b", 32, 4096, 32, 0.1, "constant", "rotational", 16, 1.0, 1e-4, 4, 10_000, 32, 5.2e9),
        ("topv2_1_5b",
         "llama2_1_5b", 24, 2048, 16, 0.2, "constant", "gradual", None, 1.0, 1e-4, 32, 5_800, 8, None),
    ]
}  # fmt: skip
LR_WITHOUT_DROPOUT = {"llama2_1_5b_scratch": 4e-4, "llama2_7b_scratch": 3e-4}
BILLION_PARAMETERS = {  # as published; the 1.5B is ours but for its name
    "llama1_7b": (6.738, 6.739), "llama2_7b": (6.738, 6.739), "llama2_13b": (13.015, 13.016),
    "llama2_1_5b": (1.45, 1.55), "llama3_8b": (8.030, 8.031), "llama3_2_1b": (1.2358, 1.2359),
}  # fmt: skip
SHARDED = {"llama2_7b_continual", "llama2_13b_continual", "llama3_8b_continual", "llama2_7b_scratch", "llama1_7b_code"}
# What the paper leaves open, and one choice serves for all.
SAME_EVERYWHERE = (
    "model.optimizer.class_path", "model.optimizer.init_args.betas", "model.optimizer.init_args.weight_decay",
    "model.lr_schedule", "model.warmup_steps", "model.final_lr_ratio", "trainer.gradient_clip_val",
    "trainer.precision", "seed_everything", "layer_dropout.depth_scale", "layer_dropout.rescale",
    "early_exit.exit_weights", "early_exit.always_on_last",
)  # fmt: skip
VARIANTS = {"layer_dropout": (True, False), "early_exit": (False, True), "baseline": (False, False)}  # drops, exits


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """From an experiment and the files stacked on it, what the command line makes of them; once each."""

    @cache
    def run(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("build"))
            patch.setattr("sys.argv", ["layerskip", "fit", *stacked(name)])
            return make_cli(Built)

    return run


@pytest.fixture(scope="module")
def settings(build):
    """From an experiment and the files stacked on it, the settings that the command line reads."""

    @cache
    def parse(name, *above):
        built = build("topv2_1_5b" if above or name not in PAPER else name)
        if above or name not in PAPER:
            return built.parser.parse_args(["fit", *stacked(name, *above)]).fit
        return built.config.fit

    return parse


def stacked(name, *above):
    """The arguments for an experiment with its architecture and other files above it."""
    return [word for file in (experiment(name), *architecture_file(name), *above) for word in ("--config", str(file))]


def pretrained(name):
    return yaml.safe_load(experiment(name).read_text())["model"].get("pretrained")


def architecture_file(name):
    """Stacked on an experiment that continues a checkpoint, which is not here: its architecture alone."""
    return [CONFIGS / f"model/{PAPER[name]['model']}.yaml"] if pretrained(name) else []


def architecture(name):
    settings = yaml.safe_load((CONFIGS / f"model/{name}.yaml").read_text())["model"]
    assert settings["pretrained"] is None
    assert settings["config"]["class_path"] == "transformers.LlamaConfig"
    return LlamaConfig(**settings["config"]["init_args"])


def experiment(name):
    return CONFIGS / f"experiment/{name}.yaml"


def callback(built, kind):
    (found,) = [callback for callback in built.trainer.callbacks if isinstance(callback, kind)]
    return found


def test_every_experiment_of_the_paper_has_a_file_and_no_file_is_left_out():
    written = {path.stem for path in CONFIGS.glob("experiment/*.yaml")}
    without_dropout = {f"{name}_{variant}" for name in LR_WITHOUT_DROPOUT for variant in ("baseline", "early_exit")}
    ours = {name for name in written if name.startswith(("topv2_small", "smollm2"))}
    assert written - ours == set(PAPER) | without_dropout


@pytest.mark.parametrize("name", PAPER)
def test_each_hyperparameter_is_the_papers(build, name):
    built, row = build(name), PAPER[name]
    config, trainer, module = built.config.fit, built.trainer, built.model
    dropout, exits = callback(built, LayerDropoutCurriculum), callback(built, EarlyExitCurriculum)
    shape = module.config
    assert (module.num_layers, shape.hidden_size, shape.num_attention_heads) == (
        row["layers"], row["width"], row["heads"]
    )  # fmt: skip
    assert (dropout.max_dropout_rate, dropout.time_scale) == (row["p_max"], row["time"])
    assert (dropout.depth_scale, dropout.rescale) == ("exponential", False)
    assert (exits.curriculum, exits.early_exit_scale) == (row["curriculum"], row["e_scale"])
    assert (exits.exit_weights, exits.always_on_last) == ("quadratic", True)
    if row["R"] is not None:
        assert exits.rotation_interval == row["R"]
    data = config.data.init_args
    found = {
        "lr": config.model.optimizer.init_args.lr,
        "batch": data.batch_size,
        "steps": trainer.max_steps,
        "devices": trainer.num_nodes * trainer.num_devices,
    }
    assert {key: found[key] for key in found if row[key] is not None} == {
        key: row[key] for key in found if row[key] is not None
    }
    if row["steps"] is not None:
        assert trainer.accumulate_grad_batches == 1
    if row["tokens"] is not None:
        rows = found["devices"] * found["batch"] * trainer.accumulate_grad_batches * found["steps"]
        assert data.seq_len == 4096
        assert rows * data.seq_len == pytest.approx(row["tokens"], rel=0.01)
        assert data.seq_len <= shape.max_position_embeddings
    # a whole number of steps between validations, or a checkpoint would fall inside a step
    assert config.trainer.val_check_interval % trainer.accumulate_grad_batches == 0
    assert (config.trainer.logger.init_args.name, config.ckpt_path) == (name, None)


@pytest.mark.parametrize("name", PAPER)
def test_a_run_continues_a_checkpoint_with_its_tokenizer_or_starts_from_the_architecture(settings, name):
    found = settings(name)
    if name.endswith("_scratch"):
        assert pretrained(name) is None
        assert found.model.config.init_args.vocab_size == 32000  # of Llama 2's tokenizer
    else:
        assert pretrained(name)
        assert found.data.init_args.tokenizer is None  # the model's own


@pytest.mark.parametrize("name", PAPER)
def test_models_of_seven_billion_and_more_are_sharded_over_all_devices(build, name):
    built = build(name)
    strategy = built.config.fit.trainer.strategy
    assert isinstance(strategy, Namespace) == (name in SHARDED)
    if name in SHARDED:
        nodes, devices = built.trainer.num_nodes, built.trainer.num_nodes * built.trainer.num_devices
        assert mesh_of(strategy.init_args, num_nodes=nodes, world_size=devices) == (1, devices, 1)
        assert any(isinstance(callback, DropoutAgreementCheck) for callback in built.trainer.callbacks)
    else:
        assert strategy == "ddp"


def test_every_sharded_trainer_compares_what_ranks_are_about_to_compute():
    sharded = [file.read_text() for file in (CONFIGS / "trainer").glob("*.yaml") if "MeshStrategy" in file.read_text()]
    assert len(sharded) == 3
    assert all("class_path: callbacks.DropoutAgreementCheck" in text for text in sharded)


def test_what_the_paper_leaves_open_is_the_same_everywhere(settings):
    chosen = {name: [settings(name)[key] for key in SAME_EVERYWHERE] for name in PAPER}
    first = chosen["llama2_7b_continual"]
    assert first[1:3] == [(0.9, 0.95), 0.1]
    for name, values in chosen.items():
        assert values == first, name


def test_what_validation_looks_at_exists_in_the_model(build):
    for name, row in PAPER.items():
        built = build(name)
        decoding = callback(built, ParseValidation if name.startswith("topv2") else SelfSpeculativeValidation)
        assert max(decoding.exit_layers) < row["layers"], name
        wanted = [
            item.init_args.exit_layers
            for item in built.config.fit.trainer.callbacks
            if item.class_path.endswith("ExitQualityMonitor")
        ]
        assert wanted in ([None], [list(range(step := row["layers"] // 8, row["layers"] + 1, step))]), name


@pytest.mark.parametrize(
    ("variant", "name"),
    [(variant, "topv2_1_5b") for variant in VARIANTS]
    + [("baseline", name) for name in ("llama2_7b_scratch", "llama3_2_1b_continual")],
)
def test_a_variant_turns_off_what_its_name_leaves_out(settings, variant, name):
    drops, exits = VARIANTS[variant]
    found, row = settings(name, CONFIGS / f"variant/{variant}.yaml"), PAPER[name]
    assert found.layer_dropout.max_dropout_rate == (row["p_max"] if drops else 0.0)
    assert found.early_exit.curriculum == (row["curriculum"] if exits else "none")
    assert found.trainer.max_steps == (row["steps"] or 50_000)


def test_the_recipe_of_2026_is_linear_in_depth_and_ends_without_dropout(settings):
    given = settings("topv2_1_5b", CONFIGS / "variant/dropout_2026.yaml").layer_dropout
    kinds = {"max_dropout_rate": given.max_dropout_rate, "depth": given.depth_scale, "time": given.time_scale}
    for step in (0, 5, 10):
        wanted = [0.9 * layer_idx / 4 * (1 - step / 10) for layer_idx in range(5)]
        assert dropout_rates(step, num_layers=5, total_steps=11, **kinds) == pytest.approx(wanted)
    assert given.rescale


@pytest.mark.parametrize("variant", ["baseline", "early_exit"])
@pytest.mark.parametrize("name", LR_WITHOUT_DROPOUT)
def test_runs_from_scratch_without_dropout_have_the_papers_rate_for_that(settings, name, variant):
    without, full = settings(f"{name}_{variant}").clone(), settings(name).clone()
    rate = LR_WITHOUT_DROPOUT[name]
    assert without.model.optimizer.init_args.lr == rate
    assert without.layer_dropout.max_dropout_rate == 0.0
    assert (without.early_exit.curriculum == "none") == (variant == "baseline")
    for found in (without, full):  # beside rate, method and name, nothing differs
        found.model.optimizer.init_args.lr = found.trainer.logger.init_args.name = None
        found.early_exit = found.layer_dropout = found.config = None
        if isinstance(found.trainer.strategy, Namespace):  # read off the devices when the run is built
            found.trainer.strategy.init_args.data_parallel_size = None
    assert without == full
    assert f"{rate:.0e}".replace("e-0", "e-") in experiment(name).read_text()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_the_small_topv2_run_is_one_file_alone_or_stacked_on_it(build, variant):
    parser = build("topv2_1_5b").parser

    def parse(*names):
        files = [word for name in names for word in ("--config", str(experiment(name)))]
        return parser.parse_args(["fit", *files]).fit

    own = f"topv2_small_{variant}"
    full, alone, stacked_on_it = parse("topv2_small"), parse(own), parse("topv2_small", own)
    assert (alone.layer_dropout.max_dropout_rate > 0, alone.early_exit.curriculum != "none") == VARIANTS[variant]
    assert alone.trainer.logger.init_args.name == f"topv2-{variant.replace('_', '-')}"
    for found in (alone, stacked_on_it, full):
        found.config = None
    assert alone == stacked_on_it
    for found in (alone, full):  # beside method and name, nothing differs
        found.early_exit = found.layer_dropout = found.trainer.logger.init_args.name = None
    assert alone == full


def test_the_evaluation_of_a_topv2_run_is_stacked_on_its_config(build):
    files = [experiment("topv2_small_baseline"), CONFIGS / "variant/topv2_evaluation.yaml"]
    arguments = [word for file in files for word in ("--config", str(file))]
    parsed = build("topv2_1_5b").parser.parse_args(["fit", *arguments]).fit
    (scoring,) = parsed.trainer.callbacks
    assert (scoring.class_path, scoring.init_args.num_examples) == ("callbacks.ParseValidation", 500)
    assert parsed.trainer.logger.init_args.name == "topv2-baseline"


@pytest.mark.parametrize("name", BILLION_PARAMETERS)
def test_models_have_the_known_sizes(name):
    with torch.device("meta"):
        model = build_model(architecture(name), seed=0)
    low, high = BILLION_PARAMETERS[name]
    assert low < sum(parameter.numel() for parameter in model.parameters()) / 1e9 < high
    assert EarlyExitModel(model).num_layers == model.config.num_hidden_layers
    assert model.config.tie_word_embeddings == (name == "llama3_2_1b")


def test_llama_3_has_its_rotary_base_and_scaling():
    assert architecture("llama2_7b").rope_parameters["rope_theta"] == 10_000
    assert architecture("llama3_8b").rope_parameters == {"rope_type": "default", "rope_theta": 500_000}
    assert architecture("llama3_2_1b").rope_parameters == {
        "rope_type": "llama3", "rope_theta": 500_000, "factor": 32, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


# -- they run ----------------------------------------------------------------------------------------------------------

README = (CONFIGS / "README.md").read_text("utf-8")
SMOKE_COMMANDS = re.findall(r"^ *layerskip (fit .*smoke\w*\.yaml)$", README, re.MULTILINE)


def test_the_readme_has_a_smoke_test_of_every_experiment():
    assert {Path(command.split()[2]).stem for command in SMOKE_COMMANDS} == set(PAPER)


@pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=() if "llama3_2_1b" in command else pytest.mark.slow) for command in SMOKE_COMMANDS],
    ids=[Path(command.split()[2]).stem for command in SMOKE_COMMANDS],
)
def test_a_shrunken_experiment_trains_validates_and_saves_its_settings(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    if "topv2" in command:
        write_folder(tmp_path / "topv2")
        data = ["--data.init_args.domains", "[reminder, weather]"]
    else:  # smaller than the standard library
        corpus = {"corpus": {"kind": "files", "path": str(write_corpus(tmp_path / "corpus", files=40))}}
        data = ["--data.init_args.sources", json.dumps(corpus)]
    name = Path(command.split()[2]).stem
    assert cli(monkeypatch, *command.split(), *data) == 0
    run = tmp_path / "runs/smoke" / name
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert "config" not in saved  # all of it is there: no file is stacked on others any more
    assert saved["model"]["config"]["init_args"]["num_hidden_layers"] == PAPER[name]["layers"]
    assert saved["early_exit"]["early_exit_scale"] == PAPER[name]["e_scale"]
    assert (run / "checkpoints/last.ckpt").exists()


# -- files stacked on others -------------------------------------------------------------------------------------------


def test_included_files_lie_below_the_file_and_paths_are_relative_to_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "low").mkdir()
    (tmp_path / "low/base.yaml").write_text(
        "trainer: {max_steps: 3, log_every_n_steps: 7}\nearly_exit: {curriculum: none}\n"
    )
    (tmp_path / "low/middle.yaml").write_text("config: [base.yaml]\ntrainer: {max_steps: 4, devices: 2}\n")
    (tmp_path / "top.yaml").write_text("config: [low/middle.yaml]\ntrainer: {max_steps: 5}\n")
    stacked = ["--config", str(CONFIGS / "quickstart.yaml"), f"--config={tmp_path / 'top.yaml'}"]
    assert cli(monkeypatch, "fit", *stacked, "--print_config") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    trainer = shown["trainer"]
    assert (trainer["max_steps"], trainer["devices"], trainer["log_every_n_steps"]) == (5, 2, 7)
    assert shown["early_exit"]["curriculum"] == "none"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("config: [top.yaml]", "config: got "),
        ("config: top.yaml", "config: got 'top.yaml', allowed a list of files"),
        ("config: [3]", "config: got [3], allowed a list of files"),
        ("config: [absent.yaml]", "absent.yaml"),
        ("config: [", "not YAML"),
    ],
)
def test_a_wrong_include_ends_with_status_2(tmp_path, monkeypatch, capsys, content, message):
    (tmp_path / "top.yaml").write_text(content)
    assert cli(monkeypatch, "fit", "--config", str(tmp_path / "top.yaml")) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
