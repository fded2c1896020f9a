"""`make bench-gpu`: is it right on this device, and how fast? At most eight minutes on one GPU; small on a CPU."""

import gc
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from app.benchmark.report import environment
from app.cli.tables import print_table
from app.errors import check_range
from app.tables import Table
from app.whole_file import write_whole
from tests.bench import gpu_decoding, gpu_training
from tests.bench.gpu_decoding import Line, Request
from tests.bench.results import run_measurement

_GIB_NEEDED = {
    "135M": 2,
    "1.5B": 6,
    "7B": 20,
}  # of a device's memory: weights in bfloat16, buffers, a second set of keys


def write_gpu_results(*, seconds: float = 480.0, compile_rounds: bool = False, output: str = "build/gpu.json") -> None:
    """Check decoding on this device, then time decoding and training steps, and write it all down.

    Without a GPU tiny models run, to show that the script does; their times say nothing.

    Args:
        seconds: Time after which nothing new is begun.
        compile_rounds: Also time compiled static rounds of the smallest model, which take minutes to compile.
        output: The JSON object to write.
    """
    check_range("seconds", seconds, low=1.0)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    ends_at, failed = perf_counter() + seconds, list[str]()
    written: dict[str, Any] = {
        "environment": environment(device=device, dtype="bfloat16"),
        "device": torch.cuda.get_device_name() if has_gpu else "cpu: nothing here is a result",
        "read_gb_per_second": gpu_decoding.read_bandwidth(device) / 1e9,
    }
    with tempfile.TemporaryDirectory() as folder:
        for part, measure in _parts(device, Path(folder), with_compiled=compile_rounds).items():
            written[part] = []
            try:
                for line in measure():
                    written[part].append(line)
                    if perf_counter() > ends_at:
                        break
            except Exception as error:  # the device is lent, so the other parts run all the same
                traceback.print_exc()
                written[part].append({"stopped": f"{type(error).__name__}: {error}".splitlines()[0]})
                failed.append(part)
            if perf_counter() > ends_at:
                written[part].append({"stopped": f"after {seconds:.0f} seconds"})
            if part == "correctness":
                exact = [line for line in written[part] if line.get("dtype") == "float32"]
                written["float32_identical"] = bool(exact) and all(
                    each["identical"] == each["prompts"] for each in exact
                )
                print("float32 output identical in all ways:", written["float32_identical"])
            _print(part, written[part])
            gc.collect()
            torch.cuda.empty_cache()  # without effect where there is no GPU
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(output), json.dumps(written, indent=2) + "\n")  # after each part: the device may be lost
            if perf_counter() > ends_at:
                break
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _parts(device: torch.device, folder: Path, *, with_compiled: bool) -> Mapping[str, Callable[[], Iterator[Line]]]:
    """What is measured, in this order: first whether it is right."""
    if device.type == "cpu":
        shapes, request = gpu_decoding.TINY, Request(num_prompts=3, prompt_length=8, new_tokens=40)
        rows, seq_len, num_steps, trained = 2, 16, 3, gpu_decoding.TINY["tiny"].config
        checked = gpu_decoding.TINY["tiny"]
    else:
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        shapes = {name: shape for name, shape in gpu_decoding.SHAPES.items() if _GIB_NEEDED[name] <= memory}
        request = Request(num_prompts=4, prompt_length=128, new_tokens=192)
        rows, seq_len, num_steps, trained = 8, 1024, 12, gpu_decoding.SHAPES["135M"].config
        checked = gpu_decoding.SHAPES["135M"]
    parts: dict[str, Callable[[], Iterator[Line]]] = {
        "correctness": partial(gpu_decoding.correctness, checked, request, device=device)
    }
    for index, (name, shape) in enumerate(shapes.items()):
        compiled = with_compiled and index == 0
        measure = partial(gpu_decoding.speeds, name, shape, request, device=device, with_compiled=compiled)
        parts[f"decoding {name}"] = measure
    parts["training"] = partial(
        gpu_training.steps, trained, rows=rows, seq_len=seq_len, num_steps=num_steps, device=device, folder=folder
    )
    return parts


def _print(part: str, lines: list[Line]) -> None:
    columns = tuple(dict.fromkeys(name for line in lines for name in line))
    rows = [tuple(_shown(line.get(name)) for name in columns) for line in lines]
    print_table(Table(part, tuple(name.replace("_", " ") for name in columns), rows))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


if __name__ == "__main__":
    run_measurement(write_gpu_results, module="gpu")
