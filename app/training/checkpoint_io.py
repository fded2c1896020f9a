"""Checkpoints that are whole or absent: written beside their name, flushed, then renamed over it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from typing_extensions import override

from app.errors import CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Single-file checkpoints: streamed to disk without a second copy in memory, loaded as plain tensors only.

    Lightning's own writer buffers the file in memory and goes through the temporary folder, from where the last
    step is a copy if that is another disk: a full disk would then leave half a file under the final name.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`; whatever stood there survives a failure.

        Raises:
            CheckpointError: If the file cannot be written, for instance because the disk is full.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch's zip writer turns a failed write into a RuntimeError
            partial.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__ or error
            raise CheckpointError(
                f"cannot write checkpoint {target}: {cause}; earlier checkpoints are untouched"
            ) from error

    @override
    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,  # noqa: ARG005
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint as tensors and plain values; never unpickles anything else.

        Raises:
            CheckpointError: If the file is missing, truncated, damaged, or holds anything but plain values.
        """
        if not Path(path).is_file():
            raise CheckpointError(f"checkpoint {path}: no such file")
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"checkpoint {path}: holds objects that are not plain tensors and values") from error
        except (RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(f"checkpoint {path} is truncated or damaged ({error}); use an earlier one") from error
        return checkpoint
