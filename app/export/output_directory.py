"""Writes a directory as a whole or not at all, and replaces nothing but exports. Tested by test_directory.py.

The last line of an export's README.md is a comment that lists the export's files and signs the text above it. It shows
that a directory is an export, and whether a person added or edited a file.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from app.checkpoints.atomic import find_checkpoint, flush, partial_path, publish
from app.errors import CheckpointError, ConfigError
from app.model_files.draft_vocabulary import DRAFT_VOCABULARY_FILE

README = "README.md"
_SIGNATURE = re.compile(r"\n<!-- layerskip export: (\{.*\}) -->\n\Z")


def check_output_dir(output_dir: str, *, overwrite: bool = False, field: str = "output_dir") -> Path:
    """The absolute path of a directory that is new, empty, or an export that nobody changed; else ConfigError.

    With `overwrite` it may be any directory of files with a config.json among them, all of which will be replaced.
    """
    directory = Path(output_dir).resolve()
    if directory == directory.parent:
        raise ConfigError(field, got=output_dir, allowed="a directory below the root of the file system")
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
    raise ConfigError(field, got=output_dir, allowed=allowed, fix=f"{reason}: {fix}")


def _reason_to_keep(directory: Path) -> str:
    """Tell why a directory must not be replaced; empty for an export that nobody but our verbs changed."""
    readme = directory / README
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    signature = _SIGNATURE.search(text)
    if signature is None:
        return "it holds something else"
    signed = json.loads(signature[1])
    if signed["sha256"] != _digest(text[: signature.start()]):
        return f"its {README} was edited"
    by_verbs = {DRAFT_VOCABULARY_FILE}  # of `layerskip vocabulary` and `layerskip tune`
    added = sorted({entry.name for entry in directory.iterdir()} - set(signed["files"]) - by_verbs)
    return f"{', '.join(added)} came into it since" if added else ""


def unsigned(text: str) -> str:
    """Return the text of a README.md without its signature."""
    return _SIGNATURE.sub("", text)


def _sign(directory: Path, text: str) -> None:
    """Write README.md as the last of the directory's files."""
    files = sorted({README, *(entry.name for entry in directory.iterdir())})
    signature = json.dumps({"files": files, "sha256": _digest(text)})
    (directory / README).write_text(f"{text}\n<!-- layerskip export: {signature} -->\n", "utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def whole_or_absent(directory: Path, *, readme: str) -> Iterator[Path]:
    """A folder to write files into, which gets README.md and replaces the directory when the block ends well.

    It becomes whole or absent as a checkpoint does; the next export removes what a killed process leaves beside it.
    CheckpointError for an error of the disk.
    """
    partial = partial_path(directory)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
        partial.mkdir(parents=True)
        yield partial
        _sign(partial, readme)
        mode = (partial / README).stat().st_mode
        for path in partial.iterdir():
            path.chmod(mode)  # only the owner can read what safetensors writes
            flush(path)
        flush(partial)
        publish(directory)
    except (OSError, ValueError, SafetensorError) as error:  # transformers raises ValueError for contradictions
        _put_back(directory)
        raise CheckpointError(f"cannot write {directory}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_back(directory: Path) -> None:
    """Restore the old directory where an export ended after it had moved it away."""
    if (old := find_checkpoint(directory)) != directory:
        old.rename(directory)
