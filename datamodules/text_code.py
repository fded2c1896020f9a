"""Text and code from any number of sources, streamed and mixed by weight: for pretraining and finetuning alike."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from app.errors import ConfigError, check_range
from app.protocols import SourceStatistics
from app.text.text_tokens import around
from datamodules.loading.datamodule import RowDataModule, check_end
from datamodules.loading.tokenizers import Encoder
from datamodules.readers import open_reader
from datamodules.readers.records import Reader
from datamodules.readers.sources import Source, token_shares, warn_of_mixed_weights
from datamodules.streaming.loader import (
    STATE_KEY,
    LaneBatches,
    PositionKeeper,
    StreamLoader,
    check_lanes,
    check_position,
    stack,
)
from datamodules.streaming.packing import LongDocuments, Packing
from datamodules.streaming.source_blocks import ORDER_SETTINGS, StreamSettings
from datamodules.streaming.survey import SurveyedCorpus

_DEFAULT_VOCAB_SIZE = 4096


class TextCodeDataModule(RowDataModule):
    """Packed rows of text and code, streamed: memory does not grow with the corpus.

    A batch is a dict of int64 tensors: `input_ids`, `labels` (shifted; -100: no target), `position_ids` [B, S] and
    `source` [B]. Feed `position_ids` with `attention_mask=None, use_cache=False` (see `datamodules.streaming.packing`).

    Training has no end: epochs of the sources follow one another, each in an order of its own, at each source's own
    pace. A checkpoint holds the position in the stream, and a resumed run gets exactly the batches it would have got;
    also on another number of ranks or workers, if their product divides `num_lanes` and the global batch is the same.

    Args:
        sources: What to read, by name. Stacked configs replace the whole; equal names are merged field by field.
        seq_len: S, tokens a row; 2 or more.
        batch_size: B, rows a batch on each device; 1 or more.
        packing: `split` cuts the stream of documents into rows, and drops and pads nothing; `best_fit` leaves documents
            that fit into a row whole, and pads rows.
        long_documents: Whether the tokens of a document beyond a row go into further rows (`split`) or are left out
            (`truncate`).
        shuffle_megabytes: Text of each source that a lane holds to shuffle documents; chunks of the whole corpus are
            shuffled besides. 0 or more; a rank's memory grows by about this, times sources, times its lanes.
        num_lanes: Parts that the stream is read in, a multiple of ranks times workers, which is the default. More parts
            allow a later resume on more ranks or workers.
        validation_share: Share of documents held out, chosen by content; in (0, 1).
        validation_rows: Most rows that a source gives to validation; 1 or more.
        vocab_size: Size of the tokenizer to train, 257 or more; it is smaller if the training text is too small.
        tokenizer: A folder with a tokenizer, or a model with one, to use instead of training one; the commands take
            that of model.pretrained by default.
        num_workers: Processes that prepare batches; 0 or more. They change no batch if `num_lanes` is given.
        seed: Seed of the order of training rows; 0 or more.
        max_bad_share: Share of a source's records that may be unusable before the run stops; in [0, 1].
        cache_dir: Folder in which the trained tokenizer is kept between runs.

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
        if not sources:
            raise ConfigError("sources", got=sources, allowed="one or more, each under a name of its own")
        check_range("num_lanes", 1 if num_lanes is None else num_lanes, low=1, high=2**16)
        self._stream = StreamSettings(
            seq_len=seq_len,
            batch_size=batch_size,
            packing=packing,
            long_documents=long_documents,
            shuffle_megabytes=shuffle_megabytes,
            validation_share=validation_share,
            validation_rows=validation_rows,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            num_workers=num_workers,
            seed=seed,
            max_bad_share=max_bad_share,
        )
        super().__init__(self._stream, default_vocab_size=_DEFAULT_VOCAB_SIZE)
        self._sources = tuple(replace(source, name=name) for name, source in sources.items())
        warn_of_mixed_weights(self._sources)
        self._corpus = SurveyedCorpus(self._sources, settings=self._stream, cache_dir=Path(cache_dir))
        self._num_lanes = num_lanes
        self._keeper = PositionKeeper()
        self._opened: dict[int, list[Reader]] = {}  # by number of lanes

    @property
    def tokenizer(self) -> Any:  # transformers.PreTrainedTokenizerFast
        """The tokenizer of the data; it is trained when first asked for, also before `setup`."""
        return self._corpus.tokenizer

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self._sources)

    @property
    def source_weights(self) -> dict[str, float]:
        """Share of tokens that each source is to give; they sum to 1."""
        return token_shares(self._sources)

    def source_statistics(self) -> dict[str, SourceStatistics]:
        """Return what each source gave to training on this rank so far; records count as they are read, also ahead."""
        return self._keeper.statistics(self.source_names, share=self._share)

    def validation_prompts(self, count: int, length: int) -> list[list[int]]:
        """Return `count` prompts of `length` token ids, the same at every call; see `SurveyedCorpus.prompts`."""
        return self._corpus.prompts(count, length)

    def prepare_data(self) -> None:
        """Train the tokenizer in one process of each node; the others find it in the cache."""
        _ = self.tokenizer

    def setup(self, stage: str) -> None:
        """Check the trainer; ConfigError says that it would divide or repeat batches, or never end."""
        super().setup(stage)
        if self.trainer is not None and stage == "fit":
            check_end(self.trainer)

    def train_dataloader(self) -> StreamLoader:
        """Load batches without end, from behind the latest one that was trained on; ConfigError as of `check_lanes`."""
        settings = self._stream_settings()
        sources = list(zip(self._sources, self._readers(settings.num_lanes), strict=True))
        batches = LaneBatches(sources, encode=Encoder(self.tokenizer), settings=settings, share=self._share)
        return StreamLoader(batches, position=self._keeper.latest, num_workers=settings.num_workers, seed=settings.seed)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note the position behind a training batch, which is about to be trained on, and take it out of the batch."""
        if STATE_KEY not in batch:
            return batch
        lane, state = batch[STATE_KEY]
        self._keeper.hand_over(lane, state, step=self._steps_taken)
        return {name: column for name, column in batch.items() if name != STATE_KEY}

    def val_dataloader(self) -> DataLoader[Any]:
        """Load held-out rows, spread evenly over each source's documents; sources take turns, and ranks get as many."""
        return DataLoader(
            self._corpus.validation_rows(self._share),  # type: ignore[arg-type]  # a list is a dataset
            batch_size=self._settings.batch_size,
            collate_fn=stack,
            generator=torch.Generator().manual_seed(self._settings.seed),
        )

    test_dataloader = predict_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and the settings it depends on; all ranks must ask together."""
        return super().state_dict() | self._keeper.state(self._steps_taken, share=self._share)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the saved position, in fit alone, after `check_state_dict`; Lightning calls this at every stage."""
        self.check_state_dict(state_dict)
        if self._resumes:
            self._keeper.restore(state_dict, share=self._share)

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise CheckpointError, in fit, if the state is no position of the stream, and ConfigError as the base does.

        If no setting counts the lanes, there are as many as in the checkpoint.
        """
        if self._resumes and self._num_lanes is None:
            self._num_lanes = state_dict.get("num_lanes")
        super().check_state_dict(state_dict)
        if self._resumes:
            check_position(state_dict, num_sources=len(self._sources))

    @property
    def _steps_taken(self) -> int:
        """Optimizer steps taken; without a trainer, every batch is a step of its own."""
        return self._keeper.latest().batches if self.trainer is None else self.trainer.global_step

    def _stream_settings(self) -> StreamSettings:
        """Return the settings with the number of lanes, which depends on the trainer and the checkpoint."""
        num_replicas, workers = self._share.num_replicas, max(1, self._settings.num_workers)
        if self._num_lanes is None:
            self._num_lanes = num_replicas * workers
        check_lanes(self._num_lanes, num_replicas=num_replicas, workers=workers)
        return replace(self._stream, num_lanes=self._num_lanes)

    def _readers(self, num_lanes: int) -> list[Reader]:
        if num_lanes not in self._opened:
            self._opened = {num_lanes: [open_reader(source, min_chunks=num_lanes) for source in self._sources]}
        return self._opened[num_lanes]

    def _order(self) -> dict[str, int | float | str]:
        settings = self._stream_settings()
        readers = zip(self.source_names, self._readers(settings.num_lanes), strict=True)
        order = {name: getattr(settings, name) for name in ORDER_SETTINGS}
        order["sources"] = ", ".join(f"{source.name}={source.relative_weight}" for source in self._sources)
        if before := around(self.tokenizer).before:
            order["beginning of documents"] = str(before)
        return order | {f"files of source {name}": reader.fingerprint[:16] for name, reader in readers}
