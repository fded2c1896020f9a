"""Runs what a bench measures, and writes down and prints whether its targets are met."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from app.benchmark.report import environment
from app.cli.parsing.verb_parser import OneLineErrors
from app.errors import ConfigError
from app.whole_file import write_whole


def run_verb(*arguments: str) -> tuple[str, str]:
    """Run a verb in a process of its own; return the command as one would type it, and what it printed."""
    command = shlex.join(["layerskip", *arguments])
    print(f"\n$ {command}", flush=True)
    done = subprocess.run([sys.executable, "-m", "app", *arguments], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return command, done.stdout


def run_measurement(measure: Callable[..., None], *, module: str) -> None:
    """Parse the options of `python -m tests.bench.MODULE` and measure; a mistake ends in one line with status 2."""
    description = (measure.__doc__ or "").splitlines()[0]
    parser = OneLineErrors(prog=f"python -m tests.bench.{module}", description=description)
    parser.add_function_arguments(measure, as_group=False)
    arguments = parser.parse_args().as_dict()
    try:
        measure(**arguments)
    except ConfigError as error:
        parser.error(str(error))


def target_result(value: float, threshold: float, command: str, *, at_most: bool) -> dict[str, Any]:
    """The record of a target, which passes if `value` is at most, or at least, `threshold`."""
    passed = value <= threshold if at_most else value >= threshold
    here = environment(device=torch.device("cpu"), dtype="float32")
    return {"value": value, "target": threshold, "passed": passed, "command": command, "environment": here}


def write_results(measured: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Write the results as JSON, and print a line for each."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, json.dumps(measured, indent=2) + "\n")
    for name, result in measured.items():
        at_most = (result["value"] <= result["target"]) == result["passed"]
        bound, verdict = "at most" if at_most else "at least", "passed" if result["passed"] else "missed"
        print(f"{name}: {result['value']:.3f}, target {bound} {result['target']:.2f}: {verdict}")
