"""Tensors of a torch.distributed.checkpoint directory, one at a time, in one process, its pickle not let loose."""

from __future__ import annotations

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

from app.errors import CheckpointError

METADATA_FILE = ".metadata"  # written when all shards are

_DESCRIPTIONS: dict[tuple[str, str], Any] = {
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
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Where the checkpoint was written, on whatever system: a name, never a place to open.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,  # as Python 3.13 spells it
}


class Shards:
    """The tensors under a prefix; their parts are checked for being there, and read when asked for.

    Args:
        directory: What torch.distributed.checkpoint wrote.
        prefix: Of the keys that are wanted; it is cut off their names.

    Raises:
        CheckpointError: If a part is missing or a file truncated, or the metadata holds more than descriptions.
    """

    def __init__(self, directory: Path, *, prefix: str) -> None:
        self._directory, self._prefix = directory, prefix
        saved = read_metadata(directory / METADATA_FILE)
        self._reader = ShardReader(directory, saved)
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for key, entry in saved.state_dict_metadata.items():
            if key.startswith(prefix) and isinstance(entry, metadata.TensorStorageMetadata):
                _check_parts(directory, key, entry, saved.storage_data)
                self.shapes[key.removeprefix(prefix)] = entry.size, entry.properties.dtype

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, put together from its parts, in its own or another dtype.

        Raises:
            CheckpointError: If a part is damaged.
        """
        shape, own_dtype = self.shapes[name]
        whole = torch.empty(shape, dtype=dtype or own_dtype)
        self.read_into({name: whole})
        return whole

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors by name; of a DTensor, this rank's part is read and nothing else. Ranks need not do it together.

        Raises:
            CheckpointError: If a part is damaged.
        """
        wanted = {self._prefix + name: tensor.detach() for name, tensor in tensors.items()}
        try:
            with warnings.catch_warnings(action="ignore"):  # that there is no process group, as is meant here
                load(wanted, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:  # no subclass of Exception; it wraps whatever came out of the bytes
            reasons = [textwrap.shorten(str(reason), 200) for reason, _ in error.failures.values()]
            names = next(iter(tensors)) if len(tensors) == 1 else f"one of {len(tensors)} weights"
            raise CheckpointError(f"checkpoint {self._directory}: {names} is damaged ({'; '.join(reasons)})") from error


class ShardReader(filesystem.FileSystemReader):
    """torch's reader of shards, without its unguarded unpickling of the metadata.

    Args:
        path: The directory.
        saved: What `read_metadata` found in it.
    """

    def __init__(self, path: Path, saved: metadata.Metadata) -> None:
        super().__init__(path)
        self._saved = saved

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """What was read already."""
        return self._saved


class _DescriptionsUnpickler(pickle.Unpickler):
    """Makes torch's descriptions of shards and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Look a class up by its exact name; dotted names, which reach into a class, are in no table."""
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in _DESCRIPTIONS:
            raise pickle.UnpicklingError(f"{module}.{name} does not describe weights")
        return _DESCRIPTIONS[module, name]


def read_metadata(file: Path) -> metadata.Metadata:
    """The `.metadata` of torch.distributed.checkpoint, which is a pickle, without running what it may hold.

    Raises:
        CheckpointError: If it is damaged, or holds more than descriptions of tensors and files.
    """
    try:
        with file.open("rb") as stream:
            saved = _DescriptionsUnpickler(stream).load()
    except Exception as error:  # anything can come out of damaged bytes
        raise CheckpointError(
            f"{file}: damaged, or holds more than descriptions of weights ({textwrap.shorten(str(error), 300)})"
        ) from error
    if not (isinstance(saved, metadata.Metadata) and isinstance(saved.storage_data, dict)):
        raise CheckpointError(f"{file}: damaged, not the metadata of a distributed checkpoint")
    return saved


def _check_parts(
    path: Path, key: str, entry: metadata.TensorStorageMetadata, places: Mapping[metadata.MetadataIndex, Any]
) -> None:
    """All parts of the tensor are there, in files of this directory that are long enough."""
    if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
        raise CheckpointError(f"checkpoint {path}: parts of {key} are missing")
    for chunk in entry.chunks:
        place = places.get(metadata.MetadataIndex(key, chunk.offsets))
        if place is None or Path(place.relative_path).name != place.relative_path:
            raise CheckpointError(f"checkpoint {path}: a part of {key} is in no file of this directory")
        shard = path / place.relative_path
        if not shard.is_file() or shard.stat().st_size < place.offset + place.length:
            raise CheckpointError(
                f"checkpoint {path}: {place.relative_path} is missing or truncated; use an earlier one"
            )
