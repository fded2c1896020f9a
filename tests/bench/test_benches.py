"""Each bench on tiny models, in this process: what it writes down, and that it can fail."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from tests.bench import data_memory, data_targets, gpu, soak, targets, training_targets
from tests.bench.decoding_targets import TARGETS, Winners, winners
from tests.bench.results import run_measurement, target_result
from tests.bench.training_steps import StepSettings, our_steps, recipe_steps
from tests.support.runs import cli, curricula, make_data, make_module, make_trainer, measure_costs_once, write_corpus
from tests.support.saved_models import save_model, write_prompts
from tests.support.tiny_models import tiny_config

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
FIELDS = {"value", "target", "passed", "command", "environment"}


def _result(strategy: str, speed: float | None, exit_layer: int | None = None, drafts: int | None = None) -> Any:
    return {
        "strategy": strategy, "exit_layer": exit_layer, "num_draft_tokens": drafts, "tokens_per_second": speed,
        "identical_to_autoregressive": 1.0, "speedup": None, "predicted_speedup": None,
    }  # fmt: skip


def test_decoding_targets_are_read_off_the_fastest_lossless_setting() -> None:
    grid = [
        _result("autoregressive", 10.0),
        _result("transformers", 8.0),
        _result("self_speculative", 15.0, 1, 2),
        _result("self_speculative", 22.0, 1, 4) | {"speedup": 2.2, "predicted_speedup": 2.0},
        _result("self_speculative", 99.0, 2, 4) | {"identical_to_autoregressive": 0.9},
        _result("transformers_early_exit", 11.0, 1, 2),
        _result("transformers_early_exit", 10.0, 1, 4),
        _result("transformers_early_exit", 30.0, 2, 4),
    ]
    won = winners(grid)
    assert won == Winners(exit_layer=1, num_draft_tokens=4, transformers_num_draft_tokens=2)
    assert won.only(grid) == [grid[0], grid[1], grid[3], grid[5]]
    assert {name: target.value(won.only(grid)) for name, target in TARGETS.items()} == pytest.approx(
        {
            "decode_vs_transformers": 1.25,
            "decode_vs_transformers_topv2": 1.25,
            "self_speculative_speedup": 2.2,
            "speedup_prediction_error": 0.1,
            "vs_transformers_early_exit": 2.0,
        }
    )
    for at_most, passed in ((True, [True, True, False]), (False, [False, True, True])):
        results = [target_result(value, 2.0, "command", at_most=at_most) for value in (1.99, 2.0, 2.01)]
        assert [result["passed"] for result in results] == passed
    assert {target.value([]) for target in TARGETS.values()} == {None}


def test_what_won_is_measured_again_and_only_that_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(*arguments: str) -> tuple[str, str]:
        commands.append(arguments)
        assert cli(monkeypatch, *arguments) == 0
        return shlex.join(["layerskip", *arguments]), ""

    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "trained", num_layers=3)
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["the end of", "then more"])
    monkeypatch.setattr(targets, "_GRID", {"exit_layers": [1, 2], "num_draft_tokens": [1, 2]})
    monkeypatch.setattr(targets, "_SETTINGS", ("--max_new_tokens", "6", "--ignore_eos", "true"))
    monkeypatch.setattr(targets, "_write_prompts", lambda path, config: prompts)
    monkeypatch.setattr(targets, "_pretrained_model", lambda: None)
    monkeypatch.setattr(targets, "measure_data_targets", lambda folder, config: {})
    monkeypatch.setattr(targets, "measure_training_targets", dict)
    monkeypatch.setattr(targets, "run_verb", run)
    measure_costs_once(monkeypatch)
    targets.measure_targets(trained_model="trained")
    sweep, again = commands
    grid, confirmed = (
        json.loads(Path(f"build/{name}.json").read_text())["results"] for name in ("trained", "trained-confirmed")
    )
    fastest = max((r for r in grid if r["strategy"] == "self_speculative"), key=lambda r: float(r["tokens_per_second"]))
    assert len(grid) == 1 + 4 + 4
    assert f"--exit_layers=[{fastest['exit_layer']}]" in again
    assert [command[command.index("--repeats") + 1] for command in (sweep, again)] == ["3", "5"]
    bench = json.loads(Path("build/bench.json").read_text())
    assert set(bench) == {"self_speculative_speedup", "speedup_prediction_error", "vs_transformers_early_exit"}
    assert all(set(result) == FIELDS for result in bench.values())
    chosen = [
        r["strategy"] == "self_speculative" and r["num_draft_tokens"] == fastest["num_draft_tokens"] for r in confirmed
    ]
    speedup = bench["self_speculative_speedup"]
    assert speedup["value"] == pytest.approx(confirmed[chosen.index(True)]["speedup"])
    assert shlex.split(speedup["command"]) == ["layerskip", *again]


def test_data_targets_come_from_a_stream_and_a_training_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_here(*arguments: str) -> tuple[str, str]:
        capsys.readouterr()
        assert cli(monkeypatch, *arguments) == 0
        return shlex.join(["layerskip", *arguments]), capsys.readouterr().out

    monkeypatch.setattr(data_targets, "run_verb", run_here)
    config = yaml.safe_load(Path(CONFIG).read_text())
    sources = {"code": {"kind": "files", "path": str(write_corpus(tmp_path / "corpus", files=40))}}
    config["data"]["init_args"] |= {"sources": sources, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2}
    monkeypatch.setattr(data_targets, "_MODEL", tiny | {"num_key_value_heads": 2, "vocab_size": 300})
    monkeypatch.setattr(data_targets, "_BEFORE_RESUMING", 20_000)
    measured = data_targets.measure_data_targets(tmp_path / "build", config=str(tmp_path / "config.yaml"))
    assert {name: set(result) for name, result in measured.items()} == {
        "data_rate_ratio": FIELDS,
        "resume_seconds": FIELDS,
    }
    assert measured["data_rate_ratio"]["value"] > 0
    assert measured["resume_seconds"]["passed"] == (measured["resume_seconds"]["value"] <= 5.0)


def test_training_targets_are_measured_written_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_targets, "_PAPER", tiny_config(num_layers=4, vocab_size=50, max_length=256))
    monkeypatch.setattr(training_targets, "_SMOLLM2", tiny_config(num_layers=30, vocab_size=50, max_length=256))
    monkeypatch.setattr(training_targets, "_LOSS_SHAPE", {"num_tokens": 8, "vocab_size": 50, "width": 8})
    monkeypatch.setattr(training_targets, "StepSettings", lambda **settings: StepSettings(**settings | {"seq_len": 8}))
    peaks = {1: 100.0, 8: 110.0}
    monkeypatch.setattr(training_targets, "peak_memory", lambda _, what, *args, num_threads: peaks.get(what, 2.0**20))
    output = tmp_path / "new" / "bench.json"
    monkeypatch.setattr(sys, "argv", ["training_targets", "--repeats", "1", "--output", str(output)])
    run_measurement(training_targets.write_training_targets, module="training_targets")
    measured = json.loads(output.read_text())
    assert set(measured) == {"step_overhead", "step_overhead_wide_vocabulary", "dropout_saving", "loss_memory_ratio"}
    assert measured["loss_memory_ratio"]["value"] == pytest.approx(1.1)
    printed = capsys.readouterr().out
    assert "loss_memory_ratio: 1.100, target at most 1.15: passed" in printed
    assert "target at least 0.70" in printed


def test_what_a_gpu_will_measure_runs_on_tiny_models_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(output)])
    run_measurement(gpu.write_gpu_results, module="gpu")
    measured = json.loads(output.read_text())
    assert measured["device"] == "cpu: nothing here is a result"
    assert measured["float32_identical"] is True
    assert [len(measured[part]) for part in ("correctness", "decoding tiny", "training")] == [16, 10, 4]
    assert "self_speculative, static" in capsys.readouterr().out
    drafts = {
        line["chance_of_right_draft"]: line["acceptance"] for line in measured["decoding tiny"] if "acceptance" in line
    }
    assert drafts[1.0] == 1.0 > drafts[0.6]
    assert all(line["tokens_per_second"] > 0 for part in ("decoding tiny", "training") for line in measured[part])
    monkeypatch.setattr(sys, "argv", ["gpu", "--seconds", "1e-9", "--output", str(output)])
    with pytest.raises(SystemExit):
        run_measurement(gpu.write_gpu_results, module="gpu")


def test_a_part_that_fails_on_a_gpu_leaves_the_others_their_time_and_fails_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> Iterator[dict[str, Any]]:
        yield {"dtype": "float32", "identical": 1, "prompts": 1}
        raise torch.OutOfMemoryError("too much\nof it")

    parts = {"correctness": full, "training": lambda: iter([{"way": "plain"}])}
    monkeypatch.setattr(gpu, "_parts", lambda *_, **__: parts)
    with pytest.raises(SystemExit, match="failed: correctness"):
        gpu.write_gpu_results(output=str(tmp_path / "gpu.json"))
    measured = json.loads((tmp_path / "gpu.json").read_text())
    assert measured["correctness"][1:] == [{"stopped": "OutOfMemoryError: too much"}]
    assert (measured["float32_identical"], measured["training"]) == (True, [{"way": "plain"}])


def test_the_steps_that_are_compared_compute_the_same_loss() -> None:
    settings = StepSettings(
        config=tiny_config(num_layers=4, vocab_size=50, max_length=16),
        batch_size=2, seq_len=8, dtype=torch.float32, exit_layers=(2, 4), max_dropout_rate=0.0,
    )  # fmt: skip
    ours, recipes = our_steps(settings), recipe_steps(settings)
    assert ours["plain"]() == pytest.approx(recipes["transformers, plain"](), abs=1e-6)
    assert (expected := ours["LayerSkip"]()) != ours["plain"]()
    for name in ("recipe, logits stacked", "recipe, exit by exit"):
        assert recipes[name]() == pytest.approx(expected, abs=1e-6)
    dropped = [ours[name]() for name in ("plain", "plain, half the blocks' work", "plain, no block")]
    assert len(set(dropped)) == 3


@pytest.mark.parametrize(("peaks", "passed"), [([500, 520, 510], True), ([560, 500, 500], False)])
def test_the_greatest_peak_over_corpora_is_compared_with_the_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peaks: list[int], passed: bool
) -> None:
    sizes: list[int] = []

    def run_verb(*arguments: str) -> tuple[str, str]:
        options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument)
        corpus = Path(json.loads(options["data.sources"])["corpus"]["path"])
        sizes.append(sum(file.stat().st_size for file in corpus.iterdir()))
        figures = {"tokens_per_second": 5e5, "peak_memory_mib": peaks[len(sizes) - 1]}
        return "command", json.dumps({"sources": {"corpus": {"tokens": 4096}}} | figures)

    monkeypatch.setattr(data_memory, "run_verb", run_verb)
    output = tmp_path / "build" / "memory.json"
    data_memory.measure_data_memory(megabytes=(0.05, 0.1, 0.4), num_batches=3, output=str(output), config=CONFIG)
    assert sizes == [pytest.approx(size, abs=3e4) for size in (5e4, 1e5, 4e5)]
    result = json.loads(output.read_text())["data_memory_ratio"]
    assert set(result) == FIELDS
    assert (result["value"], result["passed"]) == (pytest.approx(max(peaks) / min(peaks)), passed)


class Leak(Callback):
    """Keeps a file open at every step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, list[Any]()

    def on_train_batch_end(self, *_: Any) -> None:
        self.files.append((self.folder / "kept").open("w"))


def test_a_handle_that_every_step_keeps_misses_its_target(tmp_path: Path) -> None:
    leak = Leak(tmp_path)
    log = soak.HoldingsLog(every_n_steps=3, output=str(tmp_path / "marks.json"))
    trainer = make_trainer(tmp_path, max_steps=12, callbacks=[*curricula(), leak, log])
    trainer.fit(make_module(), datamodule=make_data(tmp_path))
    for file in leak.files:
        file.close()
    marks = json.loads((tmp_path / "marks.json").read_text())
    assert [mark["step"] for mark in marks] == [3, 6, 9, 12]
    results = soak.soak_results(marks, "command")
    assert (results["soak_handles_growth"]["value"], results["soak_handles_growth"]["passed"]) == (9, False)
    assert results["soak_threads_growth"]["passed"]


@pytest.mark.parametrize(
    ("measure", "option", "message"),
    [
        (targets.measure_targets, "--trained_model=absent", "trained_model: got 'absent', allowed an existing model"),
        (data_memory.measure_data_memory, "--megabytes=[10, 10]", "megabytes: got (10.0, 10.0), allowed two or more"),
        (soak.measure_soak, "--num_steps=6", "num_steps: got 6, allowed a multiple of 4"),
    ],
)
def test_a_mistake_ends_with_status_2_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    measure: Callable[..., None], option: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", option])
    with pytest.raises(SystemExit) as stop:
        run_measurement(measure, module="bench")
    assert stop.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
