"""Rows of a corpus with the states that a frozen model left at each token: to train exit blocks without running it."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from app.errors import ConfigError, DataError, check_choice, check_early_exits, check_range
from app.model.cpu.precision import emulated
from app.model.weights_hash import weights_hash
from app.model_files.open import check_tokenizer_of, load_pretrained
from datamodules.loading.datamodule import RowDataModule
from datamodules.loading.tokenizers import fingerprint
from datamodules.loading.workers import WorkerLoader
from datamodules.state_cache.filling import CacheFiller, FrozenModel
from datamodules.state_cache.shards import CachedRows, RowLayout, Split, StateCache, made_from, only_writer
from datamodules.streaming.loader import STATE_KEY
from datamodules.text_code import TextCodeDataModule

_log = logging.getLogger(__name__)

StateDtype = Literal["bfloat16", "float16", "float32"]
ComputeDtype = Literal["float32", "bfloat16"]


class CachedStatesDataModule(RowDataModule):
    """Epochs over a finite number of packed rows and the states of a frozen model, which are cached on disk.

    A batch is a dict of `input_ids`, `labels` (shifted; -100: no target), `position_ids` [B, T] and `source` [B],
    int64, and of `states` [B, T, S, D] in `dtype`: for each exit E, ascending, the state leaving block E - 1, before
    any norm, and then the state after the final norm. Every row comes once an epoch.

    `prepare_data` fills the cache in one process of each node (local rank 0), on that process's device: one pass of the
    model over the first rows of the corpus's stream and over its held-out rows. A process that was killed goes on where
    it was. It holds the whole model and about two shards of at most 64 MiB, or of one batch of the corpus if that is
    more. Training maps the files, and runs no model.

    Args:
        corpus: Where the rows come from. Its `batch_size` is that of the pass through the model, its seed chooses rows.
        pretrained: The model, as model.pretrained names it, which the commands take by default.
        exit_layers: Exits E, each 1..num_layers - 1; the commands take those of model.exit_blocks by default.
        num_tokens: Tokens to cache for training, rounded up to whole rows; 1 or more. Raised later, the cache grows.
        dtype: Type of the states on disk.
        compute_dtype: Type of the products in the pass; weights are float32.
        cache_dir: Folder of this cache alone. One that was filled with another model, tokenizer, corpus, or other exits
            or types is refused.
        batch_size: B, most rows of a training batch on each device; 1 or more.
        num_workers: Processes that prepare batches; 0 or more. They change no batch.
        seed: Seed of the order of training rows; 0 or more.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        *,
        corpus: TextCodeDataModule,
        pretrained: str | None = None,
        exit_layers: list[int] | None = None,
        num_tokens: int = 1_000_000,
        dtype: StateDtype = "bfloat16",
        compute_dtype: ComputeDtype = "float32",
        cache_dir: str = "runs/states",
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if pretrained is None:
            raise ConfigError("pretrained", got=None, allowed="the model whose states are cached (model.pretrained)")
        exits = some_exits(exit_layers, field="exit_layers")
        check_range("exit_layers", min(exits), low=1)
        check_range("num_tokens", num_tokens, low=1)
        check_choice("dtype", dtype, get_args(StateDtype))
        check_choice("compute_dtype", compute_dtype, get_args(ComputeDtype))
        of_corpus = corpus._settings
        settings = replace(of_corpus, batch_size=batch_size, num_workers=num_workers, seed=seed)
        super().__init__(settings, default_vocab_size=of_corpus.vocab_size)
        self._corpus, self._pretrained, self._folder = corpus, pretrained, Path(cache_dir)
        self._exit_layers = tuple(sorted({*exits}))
        self._num_rows = ceil(num_tokens / of_corpus.seq_len)
        self._dtype, self._compute_dtype = dtype, compute_dtype

    # -- CorpusOwner, PromptOwner and StateOwner of app.protocols --------------------------------------------------

    @property
    def tokenizer(self) -> Any:  # transformers.PreTrainedTokenizerFast
        return self._corpus.tokenizer

    @property
    def source_names(self) -> Sequence[str]:
        return self._corpus.source_names

    def validation_prompts(self, count: int, length: int) -> list[list[int]]:
        return self._corpus.validation_prompts(count, length)

    @property
    def state_layers(self) -> Sequence[int]:
        return self._exit_layers

    @property
    def model_hash(self) -> str:
        """Hash of the model whose states are in the cache; DataError before `prepare_data` filled it."""
        return str(self._cache.made_from["model"])

    # -- filling ---------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fill the cache or what is missing of it, after checks of all that it was made from and of every shard.

        ConfigError if the cache in `cache_dir` was made from something else, or its disk has too little room; DataError
        if its index is damaged, or the corpus has no rows.
        """
        tokenizer = self.tokenizer
        check_tokenizer_of(self._pretrained, tokenizer, got=f"one of {len(tokenizer)} tokens")
        model = load_pretrained(self._pretrained)
        num_layers = len(model.get_decoder().layers)
        check_early_exits(self._exit_layers, num_layers=num_layers, instead="")
        facts = made_from(
            model=weights_hash(model.state_dict(), exit_layer=num_layers),
            tokenizer=fingerprint(tokenizer),
            exit_layers=self._exit_layers,
            dtype=self._dtype,
            compute_dtype=self._compute_dtype,
            corpus=self._corpus._order() | {"validation_rows": self._settings.validation_rows},
        )
        with only_writer(self._folder):
            cache = StateCache.read(self._folder)
            if cache is None:
                cache = StateCache(self._folder, facts, sum(len(batch["source"]) for batch in self._held_out()), {})
            cache.check_made_from(facts)
            self._fill(cache, model)
        self._cache = cache

    def _fill(self, cache: StateCache, model: PreTrainedModel) -> None:
        layout = RowLayout(
            seq_len=self.seq_len,
            num_states=len(self._exit_layers) + 1,
            width=model.config.get_text_config().hidden_size,
            dtype=getattr(torch, self._dtype),
            batch_size=self._corpus._settings.batch_size,
        )
        wanted = layout.shards("validation", cache.num_validation_rows) | layout.shards("train", self._num_rows)
        missing = {name: count for name, count in wanted.items() if not cache.has(name, count)}
        if not missing:
            return
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        compute_dtype = getattr(torch, self._compute_dtype)
        if device.type == "cpu" and (why := emulated(compute_dtype)):
            _log.warning("data.compute_dtype %s: %s", self._compute_dtype, why)
        filler, passes = CacheFiller(cache, layout, missing), dict.fromkeys(self.source_names, 0.0)
        frozen = FrozenModel(model, exit_layers=self._exit_layers, device=device, compute_dtype=compute_dtype)
        filler.fill("validation", cache.num_validation_rows, batches=self._held_out(), model=frozen)
        filler.fill("train", self._num_rows, batches=self._stream(passes), model=frozen)
        for name, number in passes.items():
            if number > 1:
                _log.warning("source %s was read %.1f times: lower num_tokens, or give it more text", name, number)

    def _held_out(self) -> Iterator[dict[str, Tensor]]:
        yield from self._corpus.val_dataloader()

    def _stream(self, passes: dict[str, float]) -> Iterator[dict[str, Tensor]]:
        """Return the corpus's training batches from the first one on; `passes` over each source are noted."""
        for batch in self._corpus.train_dataloader():
            _, state = batch[STATE_KEY]
            for name, source in zip(self.source_names, state, strict=True):
                passes[name] = max(passes[name], source.given.epochs)
            yield batch

    # -- rows ------------------------------------------------------------------------------------------------------

    @cached_property
    def _cache(self) -> StateCache:
        cache = StateCache.read(self._folder)
        if cache is None:
            raise DataError(f"{self._folder}: no cache of states is here yet; prepare_data fills it")
        return cache

    def setup(self, stage: str) -> None:
        """Check the trainer; ConfigError says that it would divide or repeat batches."""
        super().setup(stage)
        _ = self._cache

    def train_dataloader(self) -> WorkerLoader:
        """Load batches from the current optimizer step on; `len` is an epoch; DataError says that rows are too few."""
        return self._training_loader(self._rows("train", self._num_rows))

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the corpus's held-out rows in its order, of which every rank takes an equal part."""
        share, num_rows = self._share, self._cache.num_validation_rows
        count = share.equal_share(num_rows, fix="raise the corpus's validation_rows or validation_share")
        own = range(share.rank * count, (share.rank + 1) * count)
        return self._loader(self._rows("validation", num_rows), sampler=own, batch_size=self._settings.batch_size)

    test_dataloader = predict_dataloader = val_dataloader

    def _order(self) -> dict[str, Any]:
        made = sha256(json.dumps(self._cache.made_from, sort_keys=True).encode()).hexdigest()[:16]
        settings = self._settings
        return {"seed": settings.seed, "batch_size": settings.batch_size, "rows": self._num_rows, "cache": made}

    def _rows(self, split: Split, num_rows: int) -> CachedRows:
        return CachedRows(self._cache.files(split, num_rows), seq_len=self.seq_len)


def some_exits(exit_layers: Sequence[int] | None, *, field: str) -> Sequence[int]:
    """Return the exits whose states are cached; ConfigError if there are none."""
    if not exit_layers:
        fix = "model.exit_blocks names them, too"
        raise ConfigError(field, got=exit_layers, allowed="one or more early exits", fix=fix)
    return exit_layers
