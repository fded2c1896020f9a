"""Weights on disk as transformers' loader takes them: read one by one, in the wanted dtype, each held once.

transformers itself maps safetensors into memory and converts from there: weights of another dtype than the wanted
one would then be counted twice, in the file's and in their own.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from app.checkpoints.integrity import check_bytes
from app.checkpoints.weights import TrainedWeights
from app.errors import CheckpointError, ConfigError
from app.git_lfs import IS_POINTER, is_pointer

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredWeights:
    """Weights that are still on the disk.

    Attributes:
        path: Where, for error messages.
        dtypes: By name; that of what is no plain floating-point number as the file spells it.
        map: A tensor as a private map of its file where there can be one: memory counts as it is looked at, and the
            file must stay as it is.
        copy: A tensor in memory of its own and in this dtype; None keeps its own.
    """

    path: str
    dtypes: Mapping[str, torch.dtype | str]
    map: Callable[[str], Tensor]
    copy: Callable[[str, torch.dtype | None], Tensor]

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the first floating-point weight."""
        return next((dtype for dtype in self.dtypes.values() if isinstance(dtype, torch.dtype)), None)

    @property
    def plain(self) -> bool:
        """Whether all of them are plain floating-point numbers."""
        return all(isinstance(dtype, torch.dtype) for dtype in self.dtypes.values())

    def state_dict(self, *, dtype: torch.dtype | None, own: bool, tables: Container[str] = ()) -> dict[str, LazyTensor]:
        """What transformers can load from.

        Args:
            dtype: To convert floating-point numbers to; None for no conversion.
            own: Whether weights that need no conversion shall have memory of their own, too.
            tables: Last parts of the names of what the model keeps as other numbers.

        Reading anything else that is not plain raises CheckpointError; what has no place in the model is never read.
        """
        lock = Lock()  # transformers reads in several threads, and each would take memory for what is on its way

        def read(name: str, stored: torch.dtype | str) -> Tensor:
            wanted = dtype
            if name.rpartition(".")[2] in tables:
                wanted = None
            else:
                check_plain(self.path, name, stored)
            return self.map(name) if not own and wanted in (None, stored) else self.copy(name, wanted)

        def lazy(name: str, stored: torch.dtype | str) -> LazyTensor:
            return LazyTensor(lambda: read(name, stored), lock)

        return {name: lazy(name, stored) for name, stored in self.dtypes.items()}


def check_plain(path: str | Path, name: str, dtype: torch.dtype | str) -> None:
    """Raise CheckpointError unless this is the dtype of weights: another one's numbers would be taken for them."""
    if dtype not in _DTYPES.values():
        allowed = " | ".join(_said(plain) for plain in _DTYPES.values())
        raise CheckpointError(f"{path}: {name} has dtype {_said(dtype)}, allowed {allowed}")


def _said(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


class LazyTensor:
    """Stands for a tensor, which `[...]` reads: transformers' loader asks for no more."""

    def __init__(self, read: Callable[[], Tensor], lock: Any) -> None:
        self._read, self._lock = read, lock

    def __getitem__(self, index: Any) -> Tensor:
        with self._lock:
            return self._read()[index]


def from_checkpoint(weights: TrainedWeights) -> StoredWeights:
    """Those of a checkpoint of ours; ranks ask together.

    Raises:
        CheckpointError: If its bytes are damaged.
    """
    check_bytes(weights.path)

    def copy(name: str, dtype: torch.dtype | None) -> Tensor:
        if weights.path.is_dir():
            return weights.read(name, dtype)
        return weights.read(name).to(dtype, copy=True)

    plain = _DTYPES.values()
    dtypes = {name: dtype if dtype in plain else _said(dtype) for name, (_, dtype) in weights.shapes.items()}
    return StoredWeights(str(weights.path), dtypes, weights.read, copy)


def from_safetensors(directory: Path) -> StoredWeights:
    """Those of a Hugging Face directory, which `check_weight_files` has passed.

    Raises:
        CheckpointError: If a file is damaged.
    """
    slices: dict[str, Any] = {}
    for file in _weight_files(directory):
        try:
            handle: Any = safe_open(file, framework="pt")
            slices |= {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  # it is no mapping
        except (SafetensorError, OSError) as error:
            reason = IS_POINTER if file.is_file() and is_pointer(file) else error
            raise CheckpointError(f"{directory}: the weights are damaged ({file.name}: {reason})") from error
    dtypes = {name: _DTYPES.get(kind := stored.get_dtype(), kind) for name, stored in slices.items()}

    def read(name: str) -> Tensor:
        return slices[name][...]  # type: ignore[no-any-return]

    return StoredWeights(str(directory), dtypes, read, lambda name, dtype: read(name).to(dtype, copy=True))


def _weight_files(directory: Path) -> list[Path]:
    if (directory / SAFE_WEIGHTS_NAME).is_file():
        return [directory / SAFE_WEIGHTS_NAME]
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if elsewhere := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{elsewhere[0]!r} is no file of this directory")
        return [directory / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: damaged, not an index of safetensors files ({error})") from error


def check_weight_files(directory: Path, *, field: str) -> None:
    """Raise ConfigError if a local directory holds no safetensors weights, CheckpointError if not all of them."""
    if not any((directory / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        fix = "there are none"
        if any(file.suffix in _PICKLES for file in directory.iterdir()):
            fix = f"there are pickled ones only, which can run code; {conversion(directory)}"
        raise ConfigError(field, got=str(directory), allowed="a directory with safetensors weights", fix=fix)
    files = _weight_files(directory)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{directory}: {len(missing)} of {len(files)} weight files are missing: {missing}")


def is_pickle(path: Path) -> bool:
    """Whether the file is named like pickled weights."""
    return path.suffix in _PICKLES


def conversion(directory: Path) -> str:
    """What to do about a directory with pickled weights only."""
    source, target = json.dumps(str(directory)), json.dumps(f"{directory}-safetensors")
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f'M.from_pretrained({source}, dtype="auto").save_pretrained({target}); '
        f"T.from_pretrained({source}).save_pretrained({target})"
    )
    return f"where you trust them, convert them: python -c {shlex.quote(code)}"
