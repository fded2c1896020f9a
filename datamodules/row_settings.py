"""The settings that all datamodules of token rows have in common, checked once and in the same words."""

from __future__ import annotations

import logging
from dataclasses import InitVar, dataclass

from app.errors import check_range
from datamodules.placement import check_workers
from datamodules.tokenizers import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE

_log = logging.getLogger(__name__)

_MOST_ROWS = 2**16  # a device's batch; more are a slip of the pen


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """What decides on rows and batches of any datamodule; each datamodule says what they mean to it.

    Attributes:
        seq_len: Longest row in tokens; 2 or more.
        batch_size: Rows a batch on each device; 1 to 65,536.
        validation_rows: Of each source at most; 1 or more.
        vocab_size: Of the tokenizer to train; `MIN_VOCAB_SIZE` to `MAX_VOCAB_SIZE`.
        default_vocab_size: The datamodule's own: another one is asked for, and a given tokenizer would not heed it.
        tokenizer: Folder of one, or a model whose own to use, instead of training it.
        num_workers: Processes that prepare batches; 0 to 1,024.
        seed: 0 or more.
        max_bad_share: Of what is read; in [0, 1].

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
        check_range("batch_size", self.batch_size, low=1, high=_MOST_ROWS)
        check_range("validation_rows", self.validation_rows, low=1)
        check_range(
            "vocab_size", self.vocab_size, low=MIN_VOCAB_SIZE, high=MAX_VOCAB_SIZE, fix="every byte needs a token"
        )
        check_workers(self.num_workers)
        check_range("seed", self.seed, low=0)
        check_range("max_bad_share", self.max_bad_share, low=0, high=1)
        if self.tokenizer is not None and self.vocab_size != default_vocab_size:
            _log.warning("vocab_size has no effect: the tokenizer in %s is used", self.tokenizer)
