"""Checkpoints that are whole or absent: written beside their name, flushed, renamed; checked when they are read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from app.checkpoints.atomic import go_on_from, kept_previous, partial_of, put_in_place, remove, standing
from app.checkpoints.contents import read_file, read_whole
from app.checkpoints.integrity import KEEP_PREVIOUS, damage, saved_step
from app.checkpoints.run_lock import release
from app.checkpoints.weights import read_plain
from app.errors import CheckpointError

_log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Single-file checkpoints: streamed to disk without a second copy in memory, loaded as plain tensors only.

    Lightning's own writer buffers the file in memory and goes through the temporary folder, from where the last
    step is a copy if that is another disk: a full disk would then leave half a file under the final name.

    Args:
        fall_back: Where a checkpoint is damaged, load the one before it, if that was kept, and say so.
    """

    def __init__(self, *, fall_back: bool = False) -> None:
        super().__init__()
        self._fall_back = fall_back

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`; whatever stood there survives a failure.

        Raises:
            CheckpointError: If the file cannot be written, for instance because the disk is full.
        """
        target = Path(path)
        partial = partial_of(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(target, keep_previous=bool((storage_options or {}).get(KEEP_PREVIOUS)))
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
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,  # noqa: ARG005
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint as tensors and plain values; never unpickles anything else. All ranks must ask together.

        Args:
            path: A single file, or a directory that FSDP2 wrote.
            map_location: As torch.load's.
            weights_only: Always.

        Raises:
            CheckpointError: If it is missing, truncated, damaged, foreign, or holds anything but plain values.
        """
        whole = self.whole(Path(path))
        return read_whole(whole) if whole.is_dir() else read_file(whole, map_location=map_location)

    def whole(self, path: Path) -> Path:
        """The checkpoint to read, its bytes compared with their checksums: `path`, or one to fall back on.

        All ranks must ask together; they share the reading, and get the same answer.

        Raises:
            CheckpointError: If it is missing or damaged, and there is nothing to fall back on or that is not wanted.
        """
        path = standing(path)
        if (error := damage(path)) is None:
            go_on_from(path)
            return path
        before = kept_previous(path)
        if not before.exists():
            raise CheckpointError(error)
        if not self._fall_back:
            raise CheckpointError(f"{error}: the one before it is {before} (--fall_back_to_previous true takes it)")
        if (again := damage(before)) is not None:
            raise CheckpointError(f"{error}; {again}")
        go_on_from(before)
        _log.warning("%s. Falling back to %s: %s", error, before, _lost_steps(path, before))
        return before

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file or directory; one that is half removed is not taken for a checkpoint."""
        remove(Path(path))

    @override
    def teardown(self) -> None:
        """Let other runs write to this one's folders, also where it failed."""
        release()


def _lost_steps(damaged: Path, before: Path) -> str:
    steps = [_step(path) for path in (damaged, before)]
    if None in steps:
        return "how many steps are lost cannot be told from the damaged one"
    return f"{steps[0] - steps[1]} steps are lost, training goes on after step {steps[1]}"  # type: ignore[operator]


def _step(path: Path) -> int | None:
    if path.is_dir():
        return saved_step(path)
    try:
        return int(read_plain(path, mmap=True)["global_step"])
    except (CheckpointError, KeyError, TypeError, ValueError):  # of a damaged file
        return None
