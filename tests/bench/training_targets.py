"""The training targets of `make bench`: what a LayerSkip step costs, dropping saves, and the exits' loss takes."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig

from app.cli.tables import print_table
from app.errors import check_range
from app.tables import Table
from tests.bench.results import run_measurement, target_result, write_results
from tests.bench.training_steps import StepSettings, exit_loss, one_step, our_steps, recipe_steps, time_steps
from tests.support.memory import peak_memory
from tests.support.processors import fast_dtype

OVERHEAD_THRESHOLD = 1.10  # times a plain step, of one with two unembeddings
SAVING_THRESHOLD = 0.7  # share saved of the time that the dropped blocks' work takes
MEMORY_THRESHOLD = 1.15  # times the memory of one exit's loss, for eight
_LOSS_SHAPE = {"num_tokens": 2048, "vocab_size": 32000, "width": 256}
# As much head for the blocks' weights as in the paper's 1.5B model (5 %), and as in SmolLM2-135M (27 %).
_PAPER = LlamaConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=24,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=7168,
)
_SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
_OURS = ("plain", "two unembeddings", "plain, half the blocks' work", "plain, no block")
_COMPARED = ("LayerSkip", "transformers, plain", "recipe, logits stacked", "recipe, exit by exit")


def measure_training_targets(*, repeats: int = 5) -> dict[str, dict[str, Any]]:
    """Measure `step_overhead`, `dropout_saving` and `loss_memory_ratio`, and show the open recipes beside ours.

    Each step is timed `repeats` times, in turn with the others.
    """
    check_range("repeats", repeats, low=1)
    command = shlex.join(["python", "-m", "tests.bench.training_targets", "--repeats", str(repeats)])
    dtype = fast_dtype()
    paper = StepSettings(config=_PAPER, batch_size=4, seq_len=256, dtype=dtype, exit_layers=(8, 16, 24))
    smollm2 = StepSettings(config=_SMOLLM2, batch_size=4, seq_len=256, dtype=dtype, exit_layers=(2, 10, 18, 26, 30))
    steps = our_steps(paper)
    small = time_steps({name: steps[name] for name in _OURS}, repeats=repeats)
    _print("A model with the head's share of the paper's 1.5B", paper, small)
    steps = our_steps(smollm2)
    names = ("plain", "two unembeddings", "LayerSkip", "LayerSkip, nothing dropped")
    wide = time_steps({name: steps[name] for name in names} | recipe_steps(smollm2), repeats=repeats)
    threads = torch.get_num_threads()
    peaks = {name: peak_memory(one_step, name, smollm2, num_threads=threads) for name in ("plain", *_COMPARED)}
    _print("SmolLM2-135M's shape, five exits on", smollm2, wide, peaks)
    exits = {number: peak_memory(exit_loss, number, *_LOSS_SHAPE.values(), num_threads=threads) for number in (1, 8)}
    dropped = [0.5 * (full - none) for full, none in zip(small["plain"], small["plain, no block"], strict=True)]
    saved = [full - half for full, half in zip(small["plain"], small["plain, half the blocks' work"], strict=True)]
    overhead, wide_overhead = (ratio(times["two unembeddings"], times["plain"]) for times in (small, wide))
    return {
        "step_overhead": target_result(overhead, OVERHEAD_THRESHOLD, command, at_most=True),
        "step_overhead_wide_vocabulary": target_result(wide_overhead, OVERHEAD_THRESHOLD, command, at_most=True),
        "dropout_saving": target_result(ratio(saved, dropped), SAVING_THRESHOLD, command, at_most=False),
        "loss_memory_ratio": target_result(exits[8] / exits[1], MEMORY_THRESHOLD, command, at_most=True),
    }


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over the repeats of the ratios of what was measured next to each other."""
    return median(above / below for above, below in zip(numerators, denominators, strict=True))


def _print(
    title: str, settings: StepSettings, seconds: dict[str, list[float]], peaks: dict[str, int] | None = None
) -> None:
    rows: list[tuple[str, ...]] = [
        (
            name,
            f"{median(times):.2f}",
            f"{settings.num_tokens / median(times):.0f}",
            f"{ratio(times, seconds['plain']):.2f}",
            f"{peaks[name] / 2**20:.0f}" if peaks and name in peaks else "-",
        )
        for name, times in seconds.items()
    ]
    columns = ("forward and backward", "seconds", "tokens/s", "to plain", "peak memory (MiB)")
    print_table(Table(f"{title}: {settings.batch_size} x {settings.seq_len} tokens, {settings.dtype}", columns, rows))


def write_training_targets(*, repeats: int = 5, output: str = "build/training_targets.json") -> None:
    """Measure what a training step costs, saves and holds, and write it down.

    Args:
        repeats: Times each step is timed; the steps take turns.
        output: The JSON object to write.
    """
    write_results(measure_training_targets(repeats=repeats), Path(output))


if __name__ == "__main__":
    run_measurement(write_training_targets, module="training_targets")
