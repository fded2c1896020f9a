"""A hash by which a resumed run knows that its position still means the same records."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

import numpy as np

from datamodules.readers.sources import Source

_VERSION = 2  # raise it when the same files are cut or counted in another way


def fingerprint(source: Source, parts: Iterable[bytes], *layout: int | np.ndarray) -> str:
    """A hash of what the records are (`parts`: names, sizes, samples) and where they are (`layout`)."""
    total = sha256(repr((_VERSION, source.kind, source.field)).encode())
    for part in parts:
        total.update(part)
    for item in layout:
        total.update(item.astype("<i8").tobytes() if isinstance(item, np.ndarray) else b"%d\0" % item)
    return total.hexdigest()[:32]
