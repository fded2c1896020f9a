"""Files that are made once and kept, with checksums. Tested by tests/unit/datamodules/topv2_rows/test_store.py."""

import logging
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

_log = logging.getLogger(__name__)

_DIGEST_BYTES = 32


def cached(file: Path, make: Callable[[], bytes]) -> bytes:
    """Return the content of `file`, which `make` gives if there is no such file or it is damaged.

    Several processes may ask at once: the file appears whole or not at all. It begins with the digest of the content.
    """
    if file.is_file():
        raw = file.read_bytes()
        if raw[:_DIGEST_BYTES] == sha256(raw[_DIGEST_BYTES:]).digest():
            return raw[_DIGEST_BYTES:]
        _log.warning("%s is damaged: preparing it again", file)
    _log.info("preparing %s, once for all runs with these data and settings", file)
    content = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".making-") as folder:
        new = Path(folder) / file.name
        new.write_bytes(sha256(content).digest() + content)
        new.replace(file)
    return content
