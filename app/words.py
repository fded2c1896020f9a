"""Words of messages and reports. Tested by tests/unit/tuning/test_result.py and tests/unit/benchmark/test_report.py."""

from pathlib import Path


def counted(number: int, noun: str) -> str:
    """A number of things whose plural ends in s: `1 prompt`, `1200 prompts`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def counted_of(number: int, whole: int, noun: str) -> str:
    """`3 of 12 prompts`, or `12 prompts` if that is all of them."""
    return counted(whole, noun) if number == whole else f"{number} of {counted(whole, noun)}"


def dtype_name(dtype: object) -> str:
    """`bfloat16` for `torch.bfloat16`, as configs and `--dtype` write it."""
    return str(dtype).removeprefix("torch.")


def model_name(path: str) -> str:
    """The last part of a model's path, with the name of the run before it if the model is a checkpoint of a run."""
    parts = Path(path).parts
    return f"{parts[-3]}/{parts[-1]}" if len(parts) > 2 and parts[-2] == "checkpoints" else Path(path).name
