"""A benchmark's results as a JSON document, a table and a figure."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from app.benchmark.benchmark import Costs
from app.benchmark.result import BenchmarkResult
from app.benchmark.speedup_interval import interval_in_words
from app.decoding.result import ratio
from app.decoding.strategies import is_lossless
from app.tables import Table, cell
from app.whole_file import write_figure, write_whole

_PACKAGES = ("torch", "transformers", "layerskip-lightning")


def environment(*, device: torch.device, dtype: str) -> dict[str, Any]:
    """Return the facts that make figures comparable: versions, hardware, dtype, threads, date."""
    return machine(device) | {"dtype": dtype}


def machine(device: torch.device) -> dict[str, Any]:
    """Return the same facts but for the dtype."""
    cpu = _cpu_name()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "device_type": device.type,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    """Return the processor's name as Linux tells it, elsewhere as Python tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def report_document(
    results: Sequence[BenchmarkResult],
    *,
    costs: Costs | None,
    environment: Mapping[str, object],
    settings: Mapping[str, object],
    num_layers: int,
) -> dict[str, Any]:
    """Return the whole report; costs are null where the engine drafted nothing."""
    return {
        "environment": dict(environment),
        "settings": dict(settings),
        "costs": None if costs is None else asdict(costs.model),
        "draft_model_costs": None if costs is None or costs.draft_model is None else asdict(costs.draft_model),
        "results": [asdict(result) for result in results],
        "notes": notes(results, dtype=str(environment["dtype"]), num_layers=num_layers),
    }


def notes(results: Sequence[BenchmarkResult], *, dtype: str, num_layers: int) -> list[str]:
    """Make remarks without which the figures of a model with `num_layers` blocks would mislead."""
    said = []
    lossy = [r for r in results if not is_lossless(r.strategy, exit_layer=r.exit_layer, num_layers=num_layers)]
    differing = [r for r in results if r.num_differing and r not in lossy]
    if differing:
        gap = max((r.largest_logit_gap for r in differing if r.largest_logit_gap is not None), default=None)
        most = max(r.num_differing for r in differing)
        said.append(
            f"outputs of up to {most} of {differing[0].num_prompts} prompts differ from autoregressive decoding;"
            f" largest logit gap {cell(gap, '{:.2g}')} where they first do"
        )
        if bugs := [r for r in differing if r.num_unexplained]:
            worst = max(r.num_unexplained for r in bugs)
            said.append(f"WARNING: up to {worst} of them by more than rounding explains in {dtype}: please report it")
        else:
            said[-1] += f": ties in {dtype}, which rounding decides"
    if lossy:
        said.append("early_exit is lossy: its output is not the full model's")
    if all(result.speedup is None for result in results):
        said.append("nothing to time: every output ended at its first token; ignore_eos goes on after it")
    return said


def benchmark_tables(results: Sequence[BenchmarkResult], *, title: str) -> list[Table]:
    """Make the table of speeds, and those of drafts and of n-grams where there are any."""
    tables = [speed_table(results, title=title)]
    tables += [draft_table(results)] if any(result.drafted for result in results) else []
    return tables + ([n_gram_table(results)] if any(result.drafted_by_n_gram for result in results) else [])


def speed_table(results: Sequence[BenchmarkResult], *, title: str) -> Table:
    """Tell how fast each strategy was, by the median repeat of each batch.

    Beside the speedup stands its 95 % interval over batches like these, or, for a single batch, the lowest and the
    highest repeat.
    """
    spread, name = [result.speedup_interval for result in results], "95 %\ninterval"
    if not any(spread):
        ranges = [(result.speedup_min, result.speedup_max) for result in results]
        spread = [None if low is None or high is None else (low, high) for low, high in ranges]
        name = "whole\nrepeats"
    return Table.of_columns(
        title,
        _names(results)
        | {
            "tok/s": [cell(result.tokens_per_second, "{:.1f}") for result in results],
            "prefill\nms": [cell(1e3 * result.seconds_prefill, "{:.0f}") for result in results],
            "speedup\nmedians": [cell(result.speedup, "{:.2f}x") for result in results],
            name: [interval_in_words(interval) for interval in spread],
            "vs\ngenerate": [cell(result.speedup_vs_transformers, "{:.2f}x") for result in results],
            "vs its\nearly\nexit": [cell(r.speedup_vs_transformers_early_exit, "{:.2f}x") for r in results],
            "outputs\ndiffer": [f"{result.num_differing} of {result.num_prompts}" for result in results],
        },
    )


def draft_table(results: Sequence[BenchmarkResult]) -> Table:
    """Give reasons for the speed of what drafts: accepted drafts, and what the cost model predicts of them."""
    drafting = [result for result in results if result.drafted]
    return Table.of_columns(
        "Drafts, and the speedup predicted from them (i.i.d.: one chance of acceptance for every draft)",
        _names(drafting)
        | {
            "acceptance": [cell(result.acceptance_rate, "{:.1%}") for result in drafting],
            "by position, %": [
                " ".join("-" if share is None else f"{100.0 * share:.0f}" for share in result.acceptance_by_position)
                for result in drafting
            ],
            "tokens\na round": [cell(result.mean_tokens_per_round, "{:.2f}") for result in drafting],
            "speedup": [cell(result.speedup, "{:.2f}x") for result in drafting],
            "predicted": [
                _prediction(r.predicted_speedup_from_rounds, r.prediction_error_from_rounds) for r in drafting
            ],
            "predicted,\ni.i.d.": [_prediction(r.predicted_speedup, r.prediction_error) for r in drafting],
        },
    )


def n_gram_table(results: Sequence[BenchmarkResult]) -> Table:
    """Who drafted what, where n-grams found drafts in the text."""
    found = [result for result in results if result.drafted_by_n_gram]
    others = [(r.accepted - r.accepted_by_n_gram, r.drafted - r.drafted_by_n_gram) for r in found]
    return Table.of_columns(
        "Drafts that n-grams found in the text",
        _names(found)
        | {
            "of all drafts": [f"{result.drafted_by_n_gram / result.drafted:.0%}" for result in found],
            "acceptance": [f"{result.accepted_by_n_gram / result.drafted_by_n_gram:.1%}" for result in found],
            "of the others": [cell(ratio(*pair), "{:.1%}") for pair in others],
        },
    )


def _names(results: Sequence[BenchmarkResult]) -> dict[str, list[str]]:
    return {
        "strategy": [_name(result) for result in results],
        "exit": ["\n".join(map(str, r.drafted_by_exit)) or cell(r.exit_layer, "{}") for r in results],
        "drafts": [cell(result.num_draft_tokens, "{}") for result in results],
    }


def _name(result: BenchmarkResult) -> str:
    """Name strategy, policy, draft vocabulary and n-grams in a line each, as tables have no room beside them."""
    policy = None if result.draft_policy == "fixed" else result.draft_policy
    said = {"{}": policy, "of {} ids": result.draft_vocabulary_size, "n-grams of {}": result.n_gram_match}
    return ",\n".join([result.strategy, *(words.format(number) for words, number in said.items() if number)])


def _prediction(speedup: float | None, error: float | None) -> str:
    return "-" if speedup is None or error is None else f"{speedup:.2f}x ({error:+.0%})"


def write_report(document: Mapping[str, Any], figure: Figure, output: Path) -> Path:
    """Write the document to `output` and the figure beside it, each whole or not at all; return the figure's path."""
    picture = output.with_suffix(".png")
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    write_figure(picture, figure)
    write_whole(output, text)
    return picture
