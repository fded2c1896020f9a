"""Text and code from local sources, mixed by weight: the datamodule that pre-training and finetuning share."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Subset

from app.errors import ConfigError, DataError, check_range
from datamodules.mixture import MixtureOrder
from datamodules.prompts import held_out_prompts
from datamodules.sources import Source
from datamodules.step_loader import Batch, Placement, RowDataset, StepBatchSampler, StepLoader
from datamodules.token_store import Split, StoreSettings, TokenStore, open_store
from datamodules.tokenizers import MIN_VOCAB_SIZE

log = logging.getLogger(__name__)

_DEFAULT_VOCAB_SIZE = 4096


class TextCodeDataModule(LightningDataModule):
    """Packed rows of text and code, held in memory.

    A batch is a dict of int64 tensors: `input_ids`, `labels` (shifted; -100: no target), `position_ids` [B, S] and
    `source` [B]. Feed `position_ids` with `attention_mask=None, use_cache=False` (see `datamodules.packing`).

    Args:
        sources: What to read, by name. Stacked configs replace the whole; equal names are merged field by field.
        seq_len: S, tokens a row; 2 or more.
        batch_size: B, rows a batch on each device; 1 or more.
        validation_share: Share of documents held out, chosen by content; in (0, 1).
        validation_rows: Rows a source gives to validation at most; 1 or more.
        vocab_size: Size of the tokenizer to train, 257 or more; smaller if the training text is too small for it.
        tokenizer: Folder of a tokenizer to use instead of training one.
        num_workers: Processes that prepare batches; 0 or more; changes no batch.
        seed: Of the order of training rows; 0 or more.
        max_bad_share: Share of empty or non-UTF-8 files a source may have; in [0, 1].
        cache_dir: Where tokenizer and rows are kept between runs.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        *,
        sources: dict[str, Source],
        seq_len: int = 256,
        batch_size: int = 8,
        validation_share: float = 0.05,
        validation_rows: int = 64,
        vocab_size: int = _DEFAULT_VOCAB_SIZE,
        tokenizer: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        max_bad_share: float = 0.05,
        cache_dir: str = "runs/data",
    ) -> None:
        super().__init__()
        named = tuple(replace(source, name=name) for name, source in sources.items())
        if not named:
            raise ConfigError("sources", got=sources, allowed="one or more, each under a name of its own")
        check_range("seq_len", seq_len, low=2)
        check_range("batch_size", batch_size, low=1)
        if not 0 < validation_share < 1:
            raise ConfigError("validation_share", got=validation_share, allowed="(0, 1)")
        check_range("validation_rows", validation_rows, low=1)
        check_range("vocab_size", vocab_size, low=MIN_VOCAB_SIZE, fix="every byte needs a token")
        check_range("num_workers", num_workers, low=0)
        check_range("seed", seed, low=0)
        check_range("max_bad_share", max_bad_share, low=0, high=1)
        if tokenizer is not None and vocab_size != _DEFAULT_VOCAB_SIZE:
            log.warning("vocab_size has no effect: the tokenizer in %s is used", tokenizer)
        self._settings = StoreSettings(
            sources=named,
            seq_len=seq_len,
            validation_share=validation_share,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            max_bad_share=max_bad_share,
        )
        self._batch_size, self._num_workers = batch_size, num_workers
        self._validation_rows = validation_rows
        self._seed = seed
        self._cache_dir = Path(cache_dir)
        self._opened: TokenStore | None = None

    # What others ask for.

    @property
    def tokenizer(self) -> Any:  # transformers.PreTrainedTokenizerFast
        """The tokenizer of the data; asking for it before `setup` prepares the data."""
        return self._store.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids, as trained; asking for it before `setup` prepares the data."""
        return len(self.tokenizer)

    @property
    def seq_len(self) -> int:
        """S, tokens a row."""
        return self._settings.seq_len

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources; `batch["source"]` indexes them."""
        return tuple(source.name for source in self._settings.sources)

    def token_counts(self, split: Split) -> dict[str, int]:
        """Tokens of each source on one side of the split, without padding."""
        rows = self._store.rows[split]
        return {name: packed.num_tokens for name, packed in zip(self.source_names, rows, strict=True)}

    def validation_prompts(self, count: int, length: int) -> list[list[int]]:
        """`count` prompts of `length` token ids: the beginnings of held-out documents, alternating between sources.

        The same at every call. Documents with something left to continue come first; if there are too few of them,
        shorter ones give shorter prompts, and if there are too few of all, fewer prompts come back, with a warning.

        Raises:
            DataError: Nothing is held out.
        """
        prompts = held_out_prompts(self._store.rows["validation"], count=count, length=length)
        if not prompts:
            raise DataError(self._nothing_held_out())
        if len(prompts) < count:
            log.warning("%d prompts asked for, %d documents held out", count, len(prompts))
        return prompts

    # What Lightning asks for.

    def prepare_data(self) -> None:
        """Fill the cache, on one process of each node."""
        open_store(self._settings, cache_dir=self._cache_dir)

    def setup(self, stage: str) -> None:
        """Load the data.

        Raises:
            ConfigError: The trainer would shard or repeat batches that already have their place.
        """
        if self.trainer is not None:
            self._check_trainer(self.trainer)
        _ = self._store

    def train_dataloader(self) -> StepLoader:
        """Batches from the current optimizer step on; `len` is a full virtual epoch, about one pass over the rows.

        Raises:
            DataError: There are fewer rows than one batch takes.
        """
        rows, place = self._store.rows["train"], Placement.of(self.trainer)
        num_rows, per_batch = sum(packed.num_rows for packed in rows), self._batch_size * place.world_size
        if num_rows < per_batch:
            raise DataError(
                f"{num_rows} training rows of {self._settings.seq_len} tokens are less than one batch of {per_batch} "
                f"({self._batch_size} on each of {place.world_size} devices); lower batch_size or seq_len, or add data"
            )
        sampler = StepBatchSampler(
            order=MixtureOrder(
                weights=[source.weight for source in self._settings.sources],
                num_rows=[packed.num_rows for packed in rows],
                seed=self._seed,
            ),
            num_rows=num_rows,
            batch_size=self._batch_size,
            place=place,
            position=lambda: 0 if self.trainer is None else self.trainer.global_step * place.accumulate,
        )
        return StepLoader(
            RowDataset(rows),
            batch_sampler=sampler,
            num_workers=self._num_workers,
            generator=torch.Generator().manual_seed(self._seed),  # else every epoch draws from the global one
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Held-out rows spread evenly over each source's documents, sources in turn; every rank takes an equal part.

        Raises:
            DataError: Fewer rows are held out than there are ranks.
        """
        rows, place = self._store.rows["validation"], Placement.of(self.trainer)
        picks = [_spread(packed.num_rows, self._validation_rows) for packed in rows]
        order = [(source, row) for turn in zip_longest(*picks) for source, row in enumerate(turn) if row is not None]
        share = len(order) // place.world_size
        if share == 0:
            raise DataError(self._nothing_held_out())
        # Subset asks the dataset for indices[i]; a RowDataset's are pairs
        part: Subset[Batch] = Subset(RowDataset(rows), order[place.rank * share : (place.rank + 1) * share])  # type: ignore[arg-type]
        return DataLoader(
            part,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            generator=torch.Generator().manual_seed(self._seed),
        )

    def test_dataloader(self) -> DataLoader[Batch]:
        """The validation rows."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The validation rows."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, int | str]:
        """What the order of training rows depends on; the position in it is the trainer's step."""
        place = Placement.of(self.trainer)
        return {
            "seed": self._seed,
            "seq_len": self._settings.seq_len,
            "batch_size": self._batch_size,
            "trainer.accumulate_grad_batches": place.accumulate,
            "world_size": place.world_size,
            "sources": ", ".join(f"{source.name}={source.weight}" for source in self._settings.sources),
            "corpus": self._store.key,
        }

    def load_state_dict(self, state_dict: dict[str, int | str]) -> None:
        """Refuse to go on training in another order; Lightning calls it after `setup`, at every stage.

        Raises:
            ConfigError: In fit, a setting that the order depends on differs from the checkpoint's.
        """
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        for field, now in self.state_dict().items():
            if now != state_dict[field]:
                raise ConfigError(
                    field,
                    got=now,
                    allowed=f"{state_dict[field]!r}, as in the checkpoint",
                    fix="the order of training rows depends on it: restore it, or start a new run from the weights",
                )

    # Helpers.

    @property
    def _store(self) -> TokenStore:
        if self._opened is None:
            self._opened = open_store(self._settings, cache_dir=self._cache_dir)
        return self._opened

    def _check_trainer(self, trainer: Trainer) -> None:
        divides = trainer._accelerator_connector.use_distributed_sampler  # it has no public name
        if divides and Placement.of(trainer).world_size > 1:
            raise ConfigError(
                "trainer.use_distributed_sampler",
                got=True,
                allowed="False on more than one device",
                fix="batches are divided among the ranks already; Lightning would divide them again",
            )
        overfit: float = trainer.overfit_batches  # type: ignore[attr-defined]  # Lightning sets it by setattr
        if overfit:
            raise ConfigError("trainer.overfit_batches", got=overfit, allowed="0", fix="use a smaller source")

    def _nothing_held_out(self) -> str:
        return f"no held-out rows in {', '.join(self.source_names)}; raise validation_share or add documents"


def _spread(num_rows: int, limit: int) -> list[int]:
    """At most `limit` of the rows 0..num_rows-1, evenly spaced: packed rows lie document by document."""
    count = min(num_rows, limit)
    return [idx * num_rows // count for idx in range(count)]
