"""`layerskip consolidate`: a directory of shards as one file. Tested by tests/distributed/test_checkpoints.py."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from app.checkpoints.atomic import find_checkpoint
from app.checkpoints.checkpoint_io import AtomicCheckpointIO
from app.checkpoints.contents import read_whole
from app.checkpoints.integrity import check_bytes, check_finite
from app.checkpoints.weights import OPTIMIZER_STATES, STATE_DICT
from app.config_tree import walk
from app.errors import ConfigError, check_new
from app.model.process_memory import give_back_freed

_SMALL = 1 << 20  # bytes of a tensor that is not worth a file


def consolidate(*, ckpt_path: str, output: str, overwrite: bool = False) -> None:
    """Write a checkpoint directory of several ranks as one file, which resumes exactly on one device and under DDP.

    This takes memory for the largest tensor only. The others are kept in mapped files beside the output, so that the
    disk holds them twice for a while.

    Args:
        ckpt_path: The directory, as `fit` writes it under MeshStrategy.
        output: The .ckpt file to write.
        overwrite: Replace the file if there is one.
    """
    directory, target = find_checkpoint(Path(ckpt_path)), Path(output)
    if not directory.is_dir():
        raise ConfigError("ckpt_path", got=ckpt_path, allowed="a checkpoint directory; a single file is whole already")
    if target.is_dir() or target.suffix != ".ckpt":
        raise ConfigError("output", got=output, allowed="the name of a file that ends in .ckpt")
    if not overwrite:
        check_new(output, [target])
    check_bytes(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        content = read_whole(directory, keep=lambda tensor: _mapped(tensor, Path(scratch)))
        learnt = {part: content.get(part) for part in (STATE_DICT, OPTIMIZER_STATES)}
        check_finite(directory, {path: value for path, value in walk(learnt) if isinstance(value, Tensor)})
        AtomicCheckpointIO().save_checkpoint(content, target)
    num_tensors = len(content["state_dict"])
    print(f"{target}: step {content['global_step']}, {num_tensors} tensors of the model, its optimizer, data position")


def _mapped(tensor: Tensor, folder: Path) -> Tensor:
    """Return a copy that the kernel may move to the disk. Its file has lost its name and ends with the copy."""
    if tensor.nbytes < _SMALL:
        return tensor
    file = folder / "tensor"
    copy = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    file.unlink()
    copy.copy_(tensor.flatten())
    give_back_freed()  # else small objects made meanwhile keep two thirds of the memory that tensors leave
    return copy.view(tensor.shape)
