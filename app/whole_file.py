"""Writes a file whole or not at all, so that a full disk or a killed process does not damage the file before."""

import io
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib is slow to load, and most files are no pictures
    from matplotlib.figure import Figure


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Write `content`, text as UTF-8, beside `path` and rename it once it is on the disk.

    A link stays; its target is replaced and keeps its mode. A pipe or a device is written to directly.

    Raises:
        OSError: It cannot be written. The file before is unchanged, and nothing is left beside it, which also holds
            after Ctrl-C. The error names the file.
    """
    path, data = path.resolve(), content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    partial = path.with_name(f".{path.name}.partial")  # in the same folder, since a rename needs the same disk
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # which a full disk does not name
        raise


def write_figure(path: Path, figure: "Figure", *, dpi: int = 150) -> None:
    """Draw a figure as PNG and write it as `write_whole` does."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    write_whole(path, image.getvalue())
