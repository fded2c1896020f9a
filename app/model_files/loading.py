"""Fills a model from weights on the disk: built without memory or initial values, then loaded weight by weight.

transformers itself converts weights out of a map of their file, where they would count twice in memory: in the file's
dtype and in the wanted one. So its loader is given objects that read one weight at a time.
"""

import json
import logging
import shlex
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from app.checkpoints.integrity import check_bytes
from app.checkpoints.weights import TrainedWeights
from app.errors import CheckpointError, ConfigError, UserError, shortened
from app.git_lfs import IS_POINTER, is_pointer
from app.model.config_check import build_without_memory, refused_as_config
from app.model_files.generation_config import quiet_transformers
from app.words import dtype_name

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredWeights:
    """Weights on the disk, to be read one by one."""

    path: str  # for error messages
    dtypes: Mapping[str, torch.dtype | str]  # by name; a string where a weight has no plain floating-point type
    read: Callable[[str], Tensor]
    mapped: bool  # whether `read` gives a private map of the file, for which the file must stay


class _LazyTensor:
    """Stands for a tensor, which `[...]` reads. transformers' loader asks for no more."""

    def __init__(self, read: Callable[[], Tensor], lock: Any) -> None:
        self._read, self._lock = read, lock

    def __getitem__(self, index: Any) -> Tensor:
        with self._lock:
            return self._read()[index]


def fill_model(
    config: PreTrainedConfig,
    stored: StoredWeights,
    *,
    dtype: torch.dtype | None,
    own: bool,
    field: str,
    generation_config: GenerationConfig,
) -> PreTrainedModel:
    """The causal LM of `config` with stored weights, whose names may be those of older versions of transformers.

    The weights get `dtype`, or for None the type of the first one, and with `own` memory of their own. ConfigError,
    naming `field`, if transformers cannot build such a model; CheckpointError for weights that are damaged, missing, of
    another shape, not plain numbers, or of no block of the model.
    """
    plain = [kind for kind in stored.dtypes.values() if isinstance(kind, torch.dtype)]
    tables: set[str] = set()
    if len(plain) < len(stored.dtypes):  # few models keep other numbers than weights, and building one takes time
        built = build_without_memory(config, dtype=torch.float32).state_dict()
        tables = {name.rpartition(".")[2] for name, tensor in built.items() if not tensor.is_floating_point()}
    try:
        with quiet_transformers():
            model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=_lazy_state_dict(stored, dtype=dtype, own=own, tables=tables),
                dtype=dtype or next(iter(plain), None),
                attn_implementation="sdpa",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_complete` names them
                generation_config=generation_config,
            )
    except UserError:
        raise
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{stored.path}: the weights are damaged ({shortened(error)})") from error
    except Exception as error:  # constructors of any architecture raise anything
        try:
            with refused_as_config(config):
                raise
        except ConfigError as told:
            reason = shortened(f"{CONFIG_NAME}: {told}")
        raise ConfigError(field, got=stored.path, allowed="a model that can be built", fix=reason) from error
    check_complete(stored.path, info)
    return model


def _lazy_state_dict(
    stored: StoredWeights, *, dtype: torch.dtype | None, own: bool, tables: Container[str]
) -> dict[str, _LazyTensor]:
    """What transformers loads from; the entries named in `tables` keep their type, whatever it is."""
    lock = Lock()  # transformers reads in several threads, and each would take memory for the weight it reads

    def read(name: str) -> Tensor:
        is_table = name.rpartition(".")[2] in tables
        if not is_table:
            check_plain(stored.path, name, stored.dtypes[name])
        wanted = None if is_table else dtype
        return stored.read(name).to(wanted, copy=own and stored.mapped)

    return {name: _LazyTensor(lambda name=name: read(name), lock) for name in stored.dtypes}  # type: ignore[misc]


def check_plain(path: str | Path, name: str, dtype: torch.dtype | str) -> None:
    """Raise CheckpointError unless `dtype` is one of weights, since other numbers would be taken for weights."""
    if dtype not in _DTYPES.values():
        allowed = " | ".join(dtype_name(plain) for plain in _DTYPES.values())
        raise CheckpointError(f"{path}: {name} has dtype {dtype_name(dtype)}, allowed {allowed}")


def check_complete(path: str, info: dict[str, Any]) -> None:
    """Raise CheckpointError unless transformers loaded all weights; it draws those that are missing at random."""
    missing, surplus = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if misfits := sorted(info["mismatched_keys"]):
        name, stored, wanted = misfits[0]
        first = f"the first is {name}: it has shape {[*stored]}, the configuration says {[*wanted]}"
        raise CheckpointError(f"{path}: {len(misfits)} weights do not fit, {first}")
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} weights of the model are missing, the first is {missing[0]}")
    if in_blocks := [name for name in surplus if ".layers." in name]:
        first = f"of its configuration, the first is {in_blocks[0]}"
        raise CheckpointError(f"{path}: {len(in_blocks)} weights of blocks are not in a model {first}")
    if surplus:
        _log.warning("%s: %d weights are not in the model and are left out: %s", path, len(surplus), surplus)


def from_checkpoint(weights: TrainedWeights) -> StoredWeights:
    """Weights of a checkpoint of ours, or CheckpointError if bytes are damaged; all ranks call this together."""
    check_bytes(weights.path)
    plain = _DTYPES.values()
    dtypes = {name: dtype if dtype in plain else str(dtype) for name, (_, dtype) in weights.shapes.items()}
    return StoredWeights(str(weights.path), dtypes, weights.read, mapped=weights.path.is_file())


def from_safetensors(directory: Path, *, field: str) -> StoredWeights:
    """Weights of a Hugging Face directory: ConfigError if there are none, CheckpointError if they are not whole."""
    slices: dict[str, Any] = {}
    for file in _weight_files(directory, field=field):
        try:
            handle: Any = safe_open(file, framework="pt")
            slices |= {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  # it is no mapping
        except (SafetensorError, OSError) as error:
            reason = IS_POINTER if is_pointer(file) else error
            raise CheckpointError(f"{directory}: the weights are damaged ({file.name}: {reason})") from error
    dtypes = {name: _DTYPES.get(kind := stored.get_dtype(), kind) for name, stored in slices.items()}
    return StoredWeights(str(directory), dtypes, lambda name: slices[name][...], mapped=True)


def _weight_files(directory: Path, *, field: str) -> list[Path]:
    if (directory / SAFE_WEIGHTS_NAME).is_file():
        return [directory / SAFE_WEIGHTS_NAME]
    if not (index := directory / SAFE_WEIGHTS_INDEX_NAME).is_file():
        fix = "there are none"
        if any(map(is_pickle, directory.iterdir())):
            fix = f"there are pickled ones only, which can run code; {conversion(directory)}"
        raise ConfigError(field, got=str(directory), allowed="a directory with safetensors weights", fix=fix)
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if elsewhere := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{elsewhere[0]!r} is no file of this directory")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: damaged, not an index of safetensors files ({error})") from error
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise CheckpointError(f"{directory}: {len(missing)} of {len(names)} weight files are missing: {missing}")
    return [directory / name for name in names]


def is_pickle(path: Path) -> bool:
    """Whether the file is named as pickled weights are."""
    return path.suffix in _PICKLES


def conversion(directory: Path) -> str:
    """Advice, with a command, for a directory that holds pickled weights only."""
    source, target = json.dumps(str(directory)), json.dumps(f"{directory}-safetensors")
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f'M.from_pretrained({source}, dtype="auto").save_pretrained({target}); '
        f"T.from_pretrained({source}).save_pretrained({target})"
    )
    return f"where you trust them, convert them: python -c {shlex.quote(code)}"
