"""Lightning's plugin for checkpoints: whole or absent when written, verified when read. Tested by test_atomic.py."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from app.checkpoints.atomic import find_checkpoint, partial_path, previous_checkpoint, publish, remove
from app.checkpoints.contents import read_file, read_whole
from app.checkpoints.integrity import KEEP_PREVIOUS, damage, saved_step
from app.checkpoints.run_lock import release
from app.errors import CheckpointError

_log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Streams single-file checkpoints to the disk, and loads nothing but tensors and plain values.

    Lightning's own plugin buffers a file in memory and writes it through the temporary folder. If that is on another
    disk, its last step is a copy, and a full disk then leaves half a file under the final name. With `use_previous`,
    the previous checkpoint is taken, with a warning, where one is damaged.
    """

    def __init__(self, *, use_previous: bool = False) -> None:
        super().__init__()
        self._use_previous = use_previous
        self._resumed_from: Path | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a single file; the checkpoint at `path` survives a failure, which is a CheckpointError."""
        target = Path(path)
        partial = partial_path(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            publish(target, keep_previous=self.keeps_previous(target, storage_options))
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
            partial.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__ or error
            raise CheckpointError(
                f"cannot write checkpoint {target}: {cause}; earlier checkpoints are untouched"
            ) from error

    def keeps_previous(self, path: Path, storage_options: Any | None) -> bool:
        """Whether the checkpoint that a new one replaces at `path` is to be kept as the previous one.

        It is not if the run resumed from the previous one, and so found what replaced it damaged, or did not want it.
        """
        if self._resumed_from == previous_checkpoint(path).resolve():
            self._resumed_from = None  # once the new one is whole, the next may replace the previous
            return False
        return bool((storage_options or {}).get(KEEP_PREVIOUS))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,  # noqa: ARG005
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a file, or a directory as one, all ranks together; CheckpointError if missing, damaged or foreign."""
        checked = self.verified(Path(path))
        return read_whole(checked) if checked.is_dir() else read_file(checked, map_location=map_location)

    def verified(self, path: Path) -> Path:
        """The checkpoint to read, after its bytes were compared with their checksums: `path`, or the previous one.

        All ranks call it together: they share the reading and get the same answer. CheckpointError if it is missing or
        damaged, and there is no previous one or that is not wanted.
        """
        path = find_checkpoint(path)
        if (error := damage(path)) is None:
            self._resumed_from = path.resolve()
            return path
        previous = previous_checkpoint(path)
        if not previous.exists():
            raise CheckpointError(error)
        if not self._use_previous:
            raise CheckpointError(
                f"{error}: the previous checkpoint is {previous} (--fall_back_to_previous true takes it)"
            )
        if (also := damage(previous)) is not None:
            raise CheckpointError(f"{error}; {also}")
        self._resumed_from = previous.resolve()
        lost = "the damaged one does not tell how many steps are lost"
        if (last := saved_step(path)) is not None and (step := saved_step(previous)) is not None:
            lost = f"{last - step} steps are lost, training goes on after step {step}"
        _log.warning("%s. Taking the previous checkpoint %s: %s", error, previous, lost)
        return previous

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))

    def teardown(self) -> None:
        """Give the folders of the run back, also if it failed."""
        release()
