"""Tensors in a directory of shards, whose pickle runs nothing. Tested by tests/integration/test_malicious_files.py."""

import math
import pickle
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from app.errors import CheckpointError

METADATA_FILE = ".metadata"  # torch writes it after all shards


def _memory_format(kind: Any, name: str) -> Any:
    """Stands for getattr, by which the first releases of Python 3.11, such as Debian's, pickle a member of an Enum."""
    if kind is not _ALLOWED_NAMES[metadata.__name__, "_MEM_FORMAT_ENCODING"]:
        raise pickle.UnpicklingError("builtins.getattr does not describe weights")
    return kind[name]


_ALLOWED_NAMES: dict[tuple[str, str], Any] = {  # what the pickle may name; dtypes are allowed beside them
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("builtins", "getattr"): _memory_format,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # The path that the checkpoint was written to, on whatever system; it is never opened.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,  # the module's name in Python 3.13
}


class Shards:
    """The tensors whose keys begin with `prefix`, which is cut off their names; `shapes` has shape and dtype of each.

    CheckpointError if a part is missing, damaged or truncated, or the metadata is not just metadata.
    """

    def __init__(self, directory: Path, *, prefix: str) -> None:
        self._directory, self._prefix = directory, prefix
        self._reader = ShardReader(directory)
        saved = self._reader.read_metadata()
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for key, entry in saved.state_dict_metadata.items():
            if key.startswith(prefix) and isinstance(entry, metadata.TensorStorageMetadata):
                _check_parts(directory, key, entry, saved.storage_data)
                self.shapes[key.removeprefix(prefix)] = entry.size, entry.properties.dtype

    def read(self, name: str) -> Tensor:
        shape, dtype = self.shapes[name]
        whole = torch.empty(shape, dtype=dtype)
        self.read_into({name: whole})
        return whole

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors by name; of a DTensor, only this rank's part is read. Ranks need not call this together."""
        wanted = {self._prefix + name: tensor.detach() for name, tensor in tensors.items()}
        try:
            with warnings.catch_warnings(action="ignore"):  # torch warns that there is no process group
                load(wanted, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:  # not a subclass of Exception
            reasons = [textwrap.shorten(str(reason), 200) for reason, _ in error.failures.values()]
            names = next(iter(tensors)) if len(tensors) == 1 else f"one of {len(tensors)} weights"
            raise CheckpointError(f"checkpoint {self._directory}: {names} is damaged ({'; '.join(reasons)})") from error


class ShardReader(filesystem.FileSystemReader):
    """torch's reader of shards, with `read_metadata` below instead of its unguarded unpickling."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._saved = read_metadata(existing_part(path, METADATA_FILE))

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        return self._saved


def existing_part(directory: Path, name: str) -> Path:
    """The file of that name in a checkpoint directory; CheckpointError if it is missing."""
    if not (directory / name).is_file():
        raise CheckpointError.unusable(directory, f"not all there ({name} is missing)")
    return directory / name


def copy_own_part(target: Tensor, whole: Tensor) -> None:
    """Copy `whole` into `target`; into a DTensor, the part of `whole` that this rank holds of it.

    Nothing is communicated, and of a tensor that is mapped from a file only this part is read.
    """
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    mesh = target.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for mesh_dim in reversed(range(mesh.ndim)):  # FSDP2, the outer dimension, shards what tensor parallelism left.
        placement = target.placements[mesh_dim]
        if not placement.is_replicate():
            dim = placement.dim  # type: ignore[attr-defined]
            rows = math.ceil(whole.shape[dim] / mesh.size(mesh_dim))
            start = min(coordinate[mesh_dim] * rows, whole.shape[dim])
            whole = whole.narrow(dim, start, min(rows, whole.shape[dim] - start))
    target.to_local().copy_(whole)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in _ALLOWED_NAMES:  # nor is a dotted name, which would reach into a class
            raise pickle.UnpicklingError(f"{module}.{name} does not describe weights")
        return _ALLOWED_NAMES[module, name]


def read_metadata(file: Path) -> metadata.Metadata:
    """The `.metadata` of torch.distributed.checkpoint, a pickle, of which only descriptions of tensors are accepted."""
    try:
        with file.open("rb") as stream:
            saved = _MetadataUnpickler(stream).load()
    except Exception as error:  # damaged bytes can raise anything
        raise CheckpointError.unusable(file, "damaged, or holds more than descriptions of weights", error) from error
    if not (isinstance(saved, metadata.Metadata) and isinstance(saved.storage_data, dict)):
        raise CheckpointError.unusable(file, "damaged, not the metadata of a distributed checkpoint")
    return saved


def _check_parts(
    path: Path, key: str, entry: metadata.TensorStorageMetadata, stored: Mapping[metadata.MetadataIndex, Any]
) -> None:
    """Check that the parts of tensor `key` make a whole, in files of this directory that are long enough."""
    if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
        raise CheckpointError.unusable(path, f"parts of {key} are missing")
    for chunk in entry.chunks:
        part = stored.get(metadata.MetadataIndex(key, chunk.offsets))
        if part is None or Path(part.relative_path).name != part.relative_path:
            raise CheckpointError.unusable(path, f"a part of {key} is in no file of this directory")
        file = path / part.relative_path
        if not file.is_file() or file.stat().st_size < part.offset + part.length:
            raise CheckpointError.unusable(path, f"{part.relative_path} is missing or truncated")
