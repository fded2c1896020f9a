"""The settings that all datamodules of token rows share, checked once and in the same words."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import InitVar, dataclass

from app.errors import ConfigError, check_range
from datamodules.loading.tokenizers import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE

_log = logging.getLogger(__name__)

_MAX_ROWS = 2**16  # in a device's batch; a larger number is a slip of the pen
_MAX_WORKERS = 1024  # no machine has the memory for more processes
# The kernel takes 107 bytes of a socket's path; multiprocessing appends a folder and a name, of 14 and 18 bytes.
_LONGEST_TEMPORARY_FOLDER = 107 - 14 - 18


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """Settings of rows and batches; each datamodule's docstring says what they mean to it.

    `default_vocab_size` is the datamodule's own: a warning says that another one has no effect on a given tokenizer.

    Raises:
        ConfigError: A setting is out of range.
    """

    seq_len: int
    batch_size: int
    validation_rows: int
    vocab_size: int
    default_vocab_size: InitVar[int]
    tokenizer: str | None
    num_workers: int
    seed: int
    max_bad_share: float

    def __post_init__(self, default_vocab_size: int) -> None:
        check_range("seq_len", self.seq_len, low=2)
        check_range("batch_size", self.batch_size, low=1, high=_MAX_ROWS)
        check_range("validation_rows", self.validation_rows, low=1)
        check_range(
            "vocab_size", self.vocab_size, low=MIN_VOCAB_SIZE, high=MAX_VOCAB_SIZE, fix="every byte needs a token"
        )
        check_workers(self.num_workers)
        check_range("seed", self.seed, low=0)
        check_range("max_bad_share", self.max_bad_share, low=0, high=1)
        if self.tokenizer is not None and self.vocab_size != default_vocab_size:
            _log.warning("vocab_size has no effect: the tokenizer in %s is used", self.tokenizer)


def check_workers(num_workers: int) -> None:
    """Refuse a number of data workers out of range, and workers that could not open their sockets.

    Raises:
        ConfigError: Naming the setting.
    """
    check_range("num_workers", num_workers, low=0, high=_MAX_WORKERS)
    folder = tempfile.gettempdir()
    if num_workers and (size := len(folder.encode())) > _LONGEST_TEMPORARY_FOLDER:
        raise ConfigError(
            "TMPDIR",
            got=f"{folder} ({size} bytes)",
            allowed=f"at most {_LONGEST_TEMPORARY_FOLDER} bytes with data workers, whose sockets lie in there",
            fix="set a shorter one, or data.num_workers 0",
        )
