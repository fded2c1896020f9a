"""What all datamodules of token rows share: their settings, and the refusal to resume in another order of rows.

An optimizer step takes M micro-batches, the number of ranks times `accumulate_grad_batches`; the k-th of rank r of W is
number k W + r of them. Which rows micro-batch m of step t holds depends on M and not on W, so a run can resume on
another number of devices.
"""

import logging
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, Timer
from lightning.pytorch.trainer.states import TrainerFn

from app.errors import ConfigError, check_range
from datamodules.loading.length_buckets import BucketSampler
from datamodules.loading.rank_share import RankShare
from datamodules.loading.tokenizers import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE, fingerprint
from datamodules.loading.workers import WorkerLoader, prepare_worker

_log = logging.getLogger(__name__)

_MAX_ROWS = 2**16  # in a device's batch; a larger number is a slip of the pen
_MAX_WORKERS = 1024  # no machine has the memory for more processes
# The kernel takes 107 bytes of a socket's path; multiprocessing appends a folder and a name, of 14 and 18 bytes.
_LONGEST_TEMPORARY_FOLDER = 107 - 14 - 18

_MICRO_BATCHES, _TOKENIZER = "batches_per_step", "tokenizer"  # keys of M and of the tokenizer in checkpoints
_NEW_RUN = "start a new run from the weights (--model.pretrained CHECKPOINT)"


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """Settings of rows and batches, checked; each datamodule's docstring says what they mean to it."""

    seq_len: int
    batch_size: int
    validation_rows: int
    vocab_size: int
    tokenizer: str | None
    num_workers: int
    seed: int
    max_bad_share: float

    def __post_init__(self) -> None:
        check_range("seq_len", self.seq_len, low=2)
        check_range("batch_size", self.batch_size, low=1, high=_MAX_ROWS)
        check_range("validation_rows", self.validation_rows, low=1)
        check_range(
            "vocab_size", self.vocab_size, low=MIN_VOCAB_SIZE, high=MAX_VOCAB_SIZE, fix="every byte needs a token"
        )
        check_workers(self.num_workers)
        check_range("seed", self.seed, low=0)
        check_range("max_bad_share", self.max_bad_share, low=0, high=1)


def check_workers(num_workers: int) -> None:
    """Raise ConfigError for a number of data workers out of range, or workers that could not open their sockets."""
    check_range("num_workers", num_workers, low=0, high=_MAX_WORKERS)
    folder = tempfile.gettempdir()
    if num_workers and (size := len(folder.encode())) > _LONGEST_TEMPORARY_FOLDER:
        raise ConfigError(
            "TMPDIR",
            got=f"{folder} ({size} bytes)",
            allowed=f"at most {_LONGEST_TEMPORARY_FOLDER} bytes with data workers, whose sockets lie in there",
            fix="set a shorter one, or data.num_workers 0",
        )


def check_end(trainer: Trainer) -> None:
    """Raise ConfigError for a trainer that would wait for the end of a stream that has none."""
    if isinstance(trainer.limit_train_batches, int):  # that many batches are an epoch
        return
    if trainer.max_steps < 1 and not any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError("trainer.max_steps", got=trainer.max_steps, allowed=">= 1: the stream of batches has no end")
    interval = getattr(trainer, "val_check_interval", None)  # it is missing where validation goes by the clock
    if isinstance(interval, float) and trainer.limit_val_batches:  # a share of an epoch
        allowed = "a number of batches: the stream of batches has no epochs"
        raise ConfigError("trainer.val_check_interval", got=interval, allowed=allowed)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):  # it would average once, and hold the learning rate
            allowed, fix = "what averages by steps: the stream of batches has no epochs", "EMAWeightAveraging does"
            raise ConfigError("trainer.callbacks", got=type(callback).__name__, allowed=allowed, fix=fix)


class CollatedRows(Protocol):
    """A finite number of rows, of `lengths` [rows] in tokens; `collate` makes a batch of some, also of none."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Any: ...
    def collate(self, rows: Any) -> dict[str, torch.Tensor]: ...


class RowDataModule(LightningDataModule, ABC):
    """A datamodule of token rows that divides and orders its batches itself.

    A warning says that a vocabulary size other than the default has no effect on a given tokenizer.
    """

    def __init__(self, settings: RowSettings, *, default_vocab_size: int) -> None:
        super().__init__()
        if settings.tokenizer is not None and settings.vocab_size != default_vocab_size:
            _log.warning("vocab_size has no effect: the tokenizer in %s is used", settings.tokenizer)
        self._settings = settings
        self._checked: dict[str, Any] | None = None  # the state from which a fit may resume

    @property
    @abstractmethod
    def tokenizer(self) -> Any:  # transformers.PreTrainedTokenizerFast
        """The tokenizer of the data; asking for it before `setup` prepares what it needs."""

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def seq_len(self) -> int:
        """Most tokens in a row."""
        return self._settings.seq_len

    @abstractmethod
    def _order(self) -> dict[str, Any]:
        """Return all that the order of training rows depends on, except M and the tokenizer."""

    @property
    def _share(self) -> RankShare:
        return RankShare.of(self.trainer)

    @property
    def _resumes(self) -> bool:
        """Whether a saved order matters: among a trainer's stages it does in fit alone."""
        return self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING

    def setup(self, stage: str) -> None:
        """Raise ConfigError for a trainer that would divide the batches once more, or repeat them."""
        if self.trainer is None:
            return
        divides = self.trainer._accelerator_connector.use_distributed_sampler  # it has no public name
        if divides and self._share.num_replicas > 1:
            raise ConfigError(
                "trainer.use_distributed_sampler",
                got=True,
                allowed="False on more than one device",
                fix="batches are divided among the ranks already; Lightning would divide them again",
            )
        overfit: float = self.trainer.overfit_batches  # type: ignore[attr-defined]  # Lightning sets it by setattr
        if overfit:
            raise ConfigError("trainer.overfit_batches", got=overfit, allowed="0", fix="train on less data instead")

    def _training_loader(self, data: CollatedRows) -> WorkerLoader:
        """Load epochs of all rows from the current optimizer step on; DataError says that there are too few of them."""
        sampler = BucketSampler(
            data.lengths,
            batch_size=self._settings.batch_size,
            seed=self._settings.seed,
            share=self._share,
            step=lambda: 0 if self.trainer is None else self.trainer.global_step,
        )
        return self._loader(data, batch_sampler=sampler)

    def _loader(self, data: CollatedRows, **batches: Any) -> WorkerLoader:
        return WorkerLoader(
            data,  # type: ignore[arg-type]  # what can be indexed is a dataset
            collate_fn=data.collate,
            num_workers=self._settings.num_workers,
            worker_init_fn=prepare_worker,
            generator=torch.Generator().manual_seed(self._settings.seed),  # else it would draw from the global one
            **batches,
        )

    def state_dict(self) -> dict[str, Any]:
        own = {_MICRO_BATCHES: self._share.micro_batches, _TOKENIZER: fingerprint(self.tokenizer)}
        return {**self._order(), **own}

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ConfigError if a setting that the order depends on differs, in fit, or the tokenizer, at any stage.

        See `protocols.ResumableData`.
        """
        if state_dict is self._checked:  # a trainer asks first, and loads the state later
            return
        if self._resumes:
            for field, value in {**self._order(), _MICRO_BATCHES: self._share.micro_batches}.items():
                if field not in state_dict or value != state_dict[field]:
                    raise _difference(field, value, state_dict, num_replicas=self._share.num_replicas)
        if (now := fingerprint(self.tokenizer)) != state_dict[_TOKENIZER]:
            fix = "it or its training text changed: name the folder to which `layerskip export` wrote the right one"
            allowed = f"{state_dict[_TOKENIZER]!r}, the checkpoint's own"
            raise ConfigError("tokenizer", got=now, allowed=allowed, fix=fix)
        self._checked = state_dict if self._resumes else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse another order; nothing is to be restored where the trainer's step tells the position."""
        self.check_state_dict(state_dict)


def _difference(field: str, value: Any, saved: Mapping[str, Any], *, num_replicas: int) -> ConfigError:
    name, restore = field, "restore it"
    if field == _MICRO_BATCHES:
        name = "trainer.accumulate_grad_batches times devices"
        if (wanted := saved.get(field)) and wanted % num_replicas == 0:
            restore += f" (--trainer.accumulate_grad_batches {wanted // num_replicas})"
    if field not in saved:
        allowed = "what the checkpoint does not tell: an earlier version wrote it, whose order of rows was another"
        return ConfigError(name, got=value, allowed=allowed, fix=_NEW_RUN)
    allowed = f"{saved[field]!r}, as in the checkpoint"
    fix = f"the order of training rows depends on it: {restore}, or {_NEW_RUN}"
    return ConfigError(name, got=value, allowed=allowed, fix=fix)
