"""Text and code from any number of sources, streamed and mixed by weight: for pre-training and finetuning alike."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from app.errors import ConfigError, DataError, check_choice, check_range
from app.protocols import SourceStatistics
from datamodules.packing import PACKINGS, LongDocuments, Packing, Tokens
from datamodules.placement import Placement, check_end, check_same_order, check_trainer
from datamodules.prompts import held_out_prompts
from datamodules.readers import open_reader
from datamodules.readers.records import Reader
from datamodules.sources import Source
from datamodules.stream import StreamSettings
from datamodules.stream_loader import STATE_KEY, LaneBatches, StreamLoader, stack
from datamodules.stream_position import PositionKeeper
from datamodules.survey import Survey, spread_rows, survey
from datamodules.tokenizers import (
    MIN_VOCAB_SIZE,
    TOKENIZER,
    Encoder,
    check_same_tokenizer,
    fingerprint,
    load_tokenizer,
    trained_tokenizer,
)

log = logging.getLogger(__name__)

_DEFAULT_VOCAB_SIZE = 4096
_TRAINING_BYTES = 4_000_000  # enough for the merges of a small vocabulary, in about a second
_HELD_OUT_BYTES_A_TOKEN = (
    16  # several times what a token takes: validation rows come from more documents than they hold
)


class TextCodeDataModule(LightningDataModule):
    """Packed rows of text and code, streamed: memory does not grow with the corpus.

    A batch is a dict of int64 tensors: `input_ids`, `labels` (shifted; -100: no target), `position_ids` [B, S] and
    `source` [B]. Feed `position_ids` with `attention_mask=None, use_cache=False` (see `datamodules.packing`).

    Training has no end: epochs of the sources follow one another, each in an order of its own, at each source's own
    pace. A checkpoint holds the place in the stream, and a resumed run gets exactly the batches it would have got; also
    on another number of ranks or workers, if their product divides `num_lanes` and the global batch is the same.

    Args:
        sources: What to read, by name. Stacked configs replace the whole; equal names are merged field by field.
        seq_len: S, tokens a row; 2 or more.
        batch_size: B, rows a batch on each device; 1 or more.
        packing: `split`: the stream of documents is cut into rows, no token is dropped or padded; `best_fit`: documents
            that fit into a row are not cut, rows are padded.
        long_documents: `split`: what goes beyond a row goes into further rows; `truncate`: it is left out.
        shuffle_megabytes: Text of each source that a lane holds to shuffle documents; beside that, chunks of the whole
            corpus are shuffled. 0 or more; a rank's memory grows by about this, times sources, times lanes it has.
        num_lanes: Parts the stream is read in, a multiple of ranks times workers; by default just that. More allow a
            later resume on more ranks or workers.
        validation_share: Share of documents held out, chosen by content; in (0, 1).
        validation_rows: Rows a source gives to validation at most; 1 or more.
        vocab_size: Size of the tokenizer to train, 257 or more; smaller if the training text is too small for it.
        tokenizer: Folder of a tokenizer to use instead of training one.
        num_workers: Processes that prepare batches; 0 or more; changes no batch, given `num_lanes`.
        seed: Of the order of training rows; 0 or more.
        max_bad_share: Share of a source's records that may be unusable before the run stops; in [0, 1].
        cache_dir: Where the trained tokenizer is kept between runs.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        *,
        sources: dict[str, Source],
        seq_len: int = 256,
        batch_size: int = 8,
        packing: Packing = "split",
        long_documents: LongDocuments = "split",
        shuffle_megabytes: float = 8.0,
        num_lanes: int | None = None,
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
        if not sources:
            raise ConfigError("sources", got=sources, allowed="one or more, each under a name of its own")
        check_range("seq_len", seq_len, low=2)
        check_range("batch_size", batch_size, low=1)
        check_choice("packing", packing, PACKINGS)
        check_choice("long_documents", long_documents, get_args(LongDocuments))
        check_range("shuffle_megabytes", shuffle_megabytes, low=0, high=float("inf"), high_open=True)
        check_range("num_lanes", 1 if num_lanes is None else num_lanes, low=1)
        if not 0 < validation_share < 1:
            raise ConfigError("validation_share", got=validation_share, allowed="(0, 1)")
        check_range("validation_rows", validation_rows, low=1)
        check_range("vocab_size", vocab_size, low=MIN_VOCAB_SIZE, fix="every byte needs a token")
        check_range("num_workers", num_workers, low=0)
        check_range("seed", seed, low=0)
        check_range("max_bad_share", max_bad_share, low=0, high=1)
        if tokenizer is not None and vocab_size != _DEFAULT_VOCAB_SIZE:
            log.warning("vocab_size has no effect: the tokenizer in %s is used", tokenizer)
        self._sources = tuple(replace(source, name=name) for name, source in sources.items())
        self._settings = StreamSettings(
            seq_len=seq_len,
            packing=packing,
            long_documents=long_documents,
            shuffle_megabytes=shuffle_megabytes,
            validation_share=validation_share,
            max_bad_share=max_bad_share,
            seed=seed,
            num_lanes=0,  # known when the trainer is
        )
        self._batch_size, self._num_workers, self._num_lanes = batch_size, num_workers, num_lanes
        self._validation_rows = validation_rows
        self._vocab_size, self._tokenizer_folder, self._cache_dir = vocab_size, tokenizer, Path(cache_dir)
        self._keeper = PositionKeeper()
        self._opened: tuple[int, list[Reader]] | None = None  # for a number of lanes

    # What others ask for.

    @cached_property
    def tokenizer(self) -> Any:  # transformers.PreTrainedTokenizerFast
        """The tokenizer of the data; asking for it before `setup` trains it if need be."""
        if self._tokenizer_folder is not None:
            return load_tokenizer(self._tokenizer_folder)
        sample = [text for found in self._surveys for text in found.training]
        return trained_tokenizer(sample, vocab_size=self._vocab_size, cache_dir=self._cache_dir)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, as trained; asking for it before `setup` trains the tokenizer if need be."""
        return len(self.tokenizer)

    @property
    def seq_len(self) -> int:
        """S, tokens a row."""
        return self._settings.seq_len

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources; `batch["source"]` indexes them."""
        return tuple(source.name for source in self._sources)

    @property
    def source_weights(self) -> dict[str, float]:
        """Share of tokens asked of each source; they sum to 1."""
        total = sum(source.weight for source in self._sources)
        return {source.name: source.weight / total for source in self._sources}

    def source_statistics(self) -> dict[str, SourceStatistics]:
        """What each source delivered to training on this rank so far."""
        place = Placement.of(self.trainer)
        states = self._keeper.latest().lanes
        own = [state for number, state in states.items() if number % place.world_size == place.rank]
        return {
            name: SourceStatistics(
                tokens=sum(state.tokens[index] for state in own),
                rows=sum(state.rows[index] for state in own),
                epochs=sum(state.epochs[index] for state in own) / max(1, len(own)),
                seen=sum(state.seen[index] for state in own),
                skipped=sum(state.skipped[index] for state in own),
            )
            for index, name in enumerate(self.source_names)
        }

    def validation_prompts(self, count: int, length: int) -> list[list[int]]:
        """`count` prompts of `length` token ids: the beginnings of held-out documents, alternating between sources.

        The same at every call. Documents with something left to continue come first; if there are too few of them,
        shorter ones give shorter prompts, and if there are too few of all, fewer prompts come back, with a warning.

        Raises:
            DataError: Nothing is held out.
        """
        prompts = held_out_prompts(self._held_out, count=count, length=length)
        if not prompts:
            raise DataError(self._nothing_held_out())
        if len(prompts) < count:
            log.warning("%d prompts asked for, %d documents held out", count, len(prompts))
        return prompts

    # What Lightning asks for.

    def prepare_data(self) -> None:
        """Train the tokenizer, on one process of each node; the others find it in the cache."""
        _ = self.tokenizer

    def setup(self, stage: str) -> None:
        """Check that the trainer takes the stream as it is.

        Raises:
            ConfigError: The trainer would shard or repeat batches that already have their place, or never end.
        """
        if self.trainer is not None:
            check_trainer(self.trainer)
            if stage == "fit":
                check_end(self.trainer)

    def train_dataloader(self) -> StreamLoader:
        """Batches without end, from the latest one that was trained on.

        Raises:
            ConfigError: `num_lanes` does not fit the ranks and workers.
        """
        place, settings = Placement.of(self.trainer), self._stream_settings()
        batches = LaneBatches(
            list(zip(self._sources, self._readers(settings.num_lanes), strict=True)),
            encode=Encoder(self.tokenizer),
            settings=settings,
            batch_size=self._batch_size,
            place=place,
        )
        return StreamLoader(batches, position=self._keeper.latest, num_workers=self._num_workers, seed=settings.seed)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take note of a training batch's place in the stream: it is about to be trained on."""
        if STATE_KEY not in batch:
            return batch
        batch = dict(batch)
        number, state = batch.pop(STATE_KEY)
        self._keeper.hand_over(number, state, step=self._steps_taken)
        return batch

    def val_dataloader(self) -> DataLoader[Any]:
        """Held-out rows spread evenly over each source's documents, sources in turn; every rank takes an equal part.

        Raises:
            DataError: Fewer rows are held out than there are ranks.
        """
        place = Placement.of(self.trainer)
        limit = self._validation_rows
        turns = zip_longest(*(spread_rows(part, seq_len=self.seq_len, num_rows=limit) for part in self._held_out))
        rows = [(source, row) for turn in turns for source, row in enumerate(turn) if row is not None]
        share = len(rows) // place.world_size
        if share == 0:
            raise DataError(self._nothing_held_out())
        part = rows[place.rank * share : (place.rank + 1) * share]
        return DataLoader(
            part,  # type: ignore[arg-type]  # a list is a dataset
            batch_size=self._batch_size,
            collate_fn=stack,
            generator=torch.Generator().manual_seed(self._settings.seed),
        )

    def test_dataloader(self) -> DataLoader[Any]:
        """The validation rows."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """The validation rows."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, of all ranks, and what it is a place in; all ranks must ask together."""
        tokenizer = {TOKENIZER: fingerprint(self.tokenizer)}
        return self._identity() | tokenizer | self._keeper.state(self._steps_taken, place=Placement.of(self.trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the saved place; of a trainer's stages in fit alone. Lightning calls it after `setup`, at every stage.

        Raises:
            ConfigError: A setting that the stream depends on differs from the checkpoint's; or, at any stage, the
                tokenizer does.
        """
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            if self._num_lanes is None:
                self._num_lanes = state_dict["num_lanes"]
            check_same_order(self._identity(), state_dict)
            self._keeper.restore(state_dict, place=Placement.of(self.trainer))
        check_same_tokenizer(self.tokenizer, state_dict)

    # Helpers.

    @property
    def _steps_taken(self) -> int:
        """Optimizer steps; without a trainer, every batch is a step of its own."""
        return self._keeper.latest().batches if self.trainer is None else self.trainer.global_step

    @cached_property
    def _surveys(self) -> list[Survey]:
        wanted = 0 if self._tokenizer_folder else _TRAINING_BYTES // len(self._sources)
        return [
            survey(
                source,
                training_bytes=wanted,
                held_out_bytes=_HELD_OUT_BYTES_A_TOKEN * self._validation_rows * self.seq_len,
                validation_share=self._settings.validation_share,
                max_bad_share=self._settings.max_bad_share,
            )
            for source in self._sources
        ]

    @cached_property
    def _held_out(self) -> list[list[Tokens]]:
        encode = Encoder(self.tokenizer)
        return [encode(found.held_out) for found in self._surveys]

    def _stream_settings(self) -> StreamSettings:
        """With the number of lanes, which the trainer and the checkpoint have a say in."""
        ranks, workers = Placement.of(self.trainer).world_size, max(1, self._num_workers)
        if self._num_lanes is None:
            self._num_lanes = ranks * workers
        if self._num_lanes % ranks:
            raise ConfigError(
                "num_lanes",
                got=self._num_lanes,
                allowed=f"a multiple of {ranks}, the number of ranks",
                fix="a resumed run keeps its lanes: change the number of devices",
            )
        if (own := self._num_lanes // ranks) % workers:
            allowed = f"a divisor of {own}: each of {ranks} ranks has {own} of the {self._num_lanes} lanes"
            raise ConfigError("num_workers", got=workers, allowed=allowed)
        return replace(self._settings, num_lanes=self._num_lanes)

    def _readers(self, num_lanes: int) -> list[Reader]:
        if self._opened is None or self._opened[0] != num_lanes:
            readers = [open_reader(source, min_chunks=num_lanes) for source in self._sources]
            self._opened = (num_lanes, readers)
        return self._opened[1]

    def _identity(self) -> dict[str, int | float | str]:
        """All that the stream of training batches depends on."""
        settings, place = self._stream_settings(), Placement.of(self.trainer)
        readers = zip(self.source_names, self._readers(settings.num_lanes), strict=True)
        own = {
            "batch_size": self._batch_size,
            "batches_per_step": place.world_size * place.accumulate,
            "sources": ", ".join(f"{source.name}={source.weight}" for source in self._sources),
        }
        return asdict(settings) | own | {f"files of source {name}": reader.fingerprint[:16] for name, reader in readers}

    def _nothing_held_out(self) -> str:
        return f"no held-out rows in {', '.join(self.source_names)}; raise validation_share or add documents"
