"""A directory that is written whole or not at all, and that replaces nothing but what an export wrote.

The last line of an export's README.md, a comment, lists the export's files and signs the text above it. So an export
needs no file of its own to be known by, and what a person added or edited is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from app.errors import CheckpointError, ConfigError

README = "README.md"
_SIGNATURE = re.compile(r"\n<!-- layerskip export: (\{.*\}) -->\n\Z")


def check_output_dir(output_dir: str, *, overwrite: bool = False) -> Path:
    """The directory to write to, absolute.

    Args:
        output_dir: New, empty, or an export of ours that nobody added to since.
        overwrite: Take any directory of files with a config.json among them, too; all of it will be replaced.

    Raises:
        ConfigError: If it holds what must not be lost, or is a file.
    """
    directory = Path(output_dir).resolve()
    _put_back(directory)
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return directory
    reason = _reason_to_keep(directory) if directory.is_dir() else "it is a file"
    if not reason:
        return directory
    fix = "choose another, or remove this one first"
    if directory.is_dir() and (directory / CONFIG_NAME).is_file() and not any(map(Path.is_dir, directory.iterdir())):
        if overwrite:
            return directory
        fix = "choose another, or replace all of it with --overwrite true"
    allowed = "a directory that is new, empty or an earlier export"
    raise ConfigError("output_dir", got=output_dir, allowed=allowed, fix=f"{reason}: {fix}")


def _reason_to_keep(directory: Path) -> str:
    """Why it must not be replaced; empty if it is an export as it was written, tuned or not."""
    readme = directory / README
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    signature = _SIGNATURE.search(text)
    if signature is None:
        return "it holds something else"
    signed = json.loads(signature[1])
    if signed["sha256"] != _digest(text[: signature.start()]):
        return f"its {README} was edited"
    added = sorted({entry.name for entry in directory.iterdir()} - set(signed["files"]))
    return f"{', '.join(added)} came into it since" if added else ""


def unsigned(text: str) -> str:
    """The text of a README.md without what `sign` added."""
    return _SIGNATURE.sub("", text)


def _sign(directory: Path, text: str) -> None:
    """Write README.md, the last of the directory's files."""
    files = sorted({README, *(entry.name for entry in directory.iterdir())})
    signature = json.dumps({"files": files, "sha256": _digest(text)})
    (directory / README).write_text(f"{text}\n<!-- layerskip export: {signature} -->\n", "utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def whole_or_absent(directory: Path, *, readme: str) -> Iterator[Path]:
    """A folder to write files into; it takes the directory's place, README.md added, when the block ends well.

    Killed at any moment, nothing that is not whole has the directory's name. What a killed export leaves beside it, in
    hidden folders, the next one takes away.

    Args:
        directory: From `check_output_dir`.
        readme: Text of README.md.

    Raises:
        CheckpointError: If it cannot be written, for instance because the disk is full.
    """
    partial, replaced = _beside(directory, "partial"), _beside(directory, "replaced")  # a rename needs the same disk
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        yield partial
        _sign(partial, readme)
        _to_disk(partial)
        if directory.exists():
            directory.rename(replaced)
        partial.rename(directory)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a generation config that contradicts itself
        _put_back(directory)
        raise CheckpointError(f"cannot write {directory}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(directory: Path, what: str) -> Path:
    return directory.with_name(f".{directory.name}.{what}")


def _put_back(directory: Path) -> None:
    """Where an export was killed between moving the old directory away and the new one in, undo the first."""
    replaced = _beside(directory, "replaced")
    if not replaced.exists():
        return
    if directory.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(directory)


def _to_disk(folder: Path) -> None:
    """Wait until the files are on the disk, all readable for whom the first is."""
    mode = (folder / README).stat().st_mode
    for path in [*folder.iterdir(), folder]:
        if path != folder:
            path.chmod(mode)  # safetensors writes for the owner's eyes only
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
