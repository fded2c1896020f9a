"""TOPv2, utterances and their semantic parses: the datamodule of the paper's domain finetuning."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from app.errors import ConfigError, check_choice, check_range
from app.protocols import GenerationExample
from app.text.text_stream import text_of
from app.topv2.semantic_parse import TARGET_FORMATS, TargetFormat
from datamodules.loading.datamodule import RowDataModule
from datamodules.loading.workers import WorkerLoader
from datamodules.topv2_rows.files import Split, choose_domains
from datamodules.topv2_rows.rows import ExampleRows, generation_examples, held_out_rows, short_prompts, training_rows
from datamodules.topv2_rows.store import StoreSettings, TaskStore, open_store

_DEFAULT_VOCAB_SIZE = 2048
_SPLITS: dict[str, Split] = {"validate": "eval", "test": "test"}  # by stage
_UTTERANCE = "{utterance}"


class TOPv2DataModule(RowDataModule):
    """Utterances as prompts and their parses as targets, in batches of like length.

    A batch is a dict of int64 tensors: `input_ids`, `labels` (shifted; -100: no target), `position_ids` [B, T] and
    `source` [B], the domain. Only the target and the end-of-text token after it have labels. Feed `position_ids` with
    `attention_mask=None, use_cache=False` (see `topv2_rows.rows`). Every example comes once an epoch; those
    longer than `seq_len` never, with a warning that counts them.

    Args:
        path: The official folder of TSV files, a local dataset folder, or a hub id, with the columns `domain`,
            `utterance`, `semantic_parse`.
        domains: Which domains, in the order in which a batch's `source` counts them; all by default (two with `spis`).
        spis: Train and evaluate on the low-resource splits of this many samples per intent and slot, one of 10, 25,
            50, 100, 250, 500, 1000; only in the official folder, and for reminder and weather.
        prompt_template: The prompt, with {utterance} in it once; it ends without a space, which the target brings.
        target_format: `parse` keeps the annotation as it is; for `json` see `app.topv2.semantic_parse`.
        special_tokens: Add to the tokenizer a token for each label with its opening bracket, and one for the closing
            bracket. Labels are taken from the training rows.
        seq_len: Longest row in tokens, the end-of-text token not counted; 2 or more.
        packed: Fill training rows up to `seq_len` with several examples of a domain, which do not see one another.
        length_multiple: Rows are padded to the longest of a batch, rounded up to a multiple of this; 1 or more. 8 means
            few shapes and suits accelerators; 1 computes least, a tenth less here.
        batch_size: B, most rows of a batch on each device; 1 or more.
        validation_rows: Most rows that a domain gives to validation and to test, chosen at random once and for all; 1
            or more. Validation takes them from the evaluation split.
        vocab_size: Size of the tokenizer to train, special tokens included; 257 or more.
        tokenizer: A folder with a tokenizer, or a model with one, to use instead of training one; the commands take
            that of model.pretrained by default.
        num_workers: Processes that prepare batches; 0 or more. They change no batch.
        seed: Seed of the order of training rows; 0 or more.
        max_bad_share: Share of malformed rows that a file may have; in [0, 1].
        cache_dir: Folder in which tokenizer and examples are kept between runs.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        *,
        path: str,
        domains: list[str] | None = None,
        spis: Literal[10, 25, 50, 100, 250, 500, 1000] | None = None,
        prompt_template: str = "{utterance} =>",
        target_format: TargetFormat = "parse",
        special_tokens: bool = False,
        seq_len: int = 256,
        packed: bool = False,
        length_multiple: int = 8,
        batch_size: int = 64,
        validation_rows: int = 64,
        vocab_size: int = _DEFAULT_VOCAB_SIZE,
        tokenizer: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        max_bad_share: float = 0.01,
        cache_dir: str = "runs/data",
    ) -> None:
        if prompt_template.count(_UTTERANCE) != 1:
            raise ConfigError("prompt_template", got=prompt_template, allowed=f"a text with {_UTTERANCE} in it once")
        check_choice("target_format", target_format, TARGET_FORMATS)
        check_range("length_multiple", length_multiple, low=1)
        self._content = StoreSettings(
            path=path,
            domains=choose_domains(domains, spis=spis),
            spis=spis,
            prompt_template=prompt_template,
            target_format=target_format,
            special_tokens=special_tokens,
            seq_len=seq_len,
            batch_size=batch_size,
            validation_rows=validation_rows,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            num_workers=num_workers,
            seed=seed,
            max_bad_share=max_bad_share,
        )
        super().__init__(self._content, default_vocab_size=_DEFAULT_VOCAB_SIZE)
        self._packed, self._length_multiple = packed, length_multiple
        self._cache_dir = Path(cache_dir)

    @property
    def tokenizer(self) -> Any:  # transformers.PreTrainedTokenizerFast
        return self._store.tokenizer

    @property
    def source_names(self) -> tuple[str, ...]:
        return self._content.domains

    @property
    def target_format(self) -> TargetFormat:
        return self._content.target_format

    def validation_prompts(self, count: int, length: int) -> list[list[int]]:
        """Return at most `count` whole prompts of at most `length` token ids, always the same; DataError if none is."""
        return short_prompts(self._store.examples["eval"], count=count, length=length)

    def generation_examples(self, stage: str, count: int) -> list[GenerationExample]:
        """Return at most `count` shuffled examples of stage `validate` or `test`, the same at every call.

        Long ones are among them: a model that cannot finish them has them wrong.
        """
        check_choice("stage", stage, _SPLITS)
        return generation_examples(self._store.examples[_SPLITS[stage]], count=count, domains=self.source_names)

    def answer(self, tokens: Sequence[int]) -> str:
        """Return the text of generated token ids up to the end-of-text token."""
        end = self.tokenizer.eos_token_id
        written = list(tokens[: tokens.index(end)] if end in tokens else tokens)
        return text_of(self.tokenizer, written).strip()

    def prepare_data(self) -> None:
        open_store(self._content, cache_dir=self._cache_dir)

    def setup(self, stage: str) -> None:
        """Check the trainer and load the data; ConfigError says that the trainer would divide or repeat batches."""
        super().setup(stage)
        _ = self._store

    def train_dataloader(self) -> WorkerLoader:
        """Load batches from the current optimizer step on; `len` is an epoch; DataError says that rows are too few."""
        examples = self._store.examples["train"]
        rows = training_rows(examples, seq_len=self.seq_len, packed=self._packed)
        return self._training_loader(ExampleRows(examples, rows, length_multiple=self._length_multiple))

    def val_dataloader(self) -> DataLoader[Any]:
        """Load the evaluation split in ascending order of length; every rank takes an equal part of all lengths."""
        return self._held_out_loader("eval")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._held_out_loader("test")

    predict_dataloader = test_dataloader

    def _order(self) -> dict[str, int | str]:
        settings = self._settings
        return {
            "seed": settings.seed,
            "seq_len": settings.seq_len,
            "packed": self._packed,
            "batch_size": settings.batch_size,
            "domains": ", ".join(self.source_names),
            "corpus": self._store.key,
            **({"filling of rows": "best_fit"} if self._packed else {}),
        }

    @cached_property
    def _store(self) -> TaskStore:
        return open_store(self._content, cache_dir=self._cache_dir)

    def _held_out_loader(self, split: Split) -> DataLoader[Any]:
        settings, share, examples = self._settings, self._share, self._store.examples[split]
        rows = held_out_rows(examples, split=split, seq_len=settings.seq_len, per_source=settings.validation_rows)
        count = share.equal_share(len(rows), fix=f"raise validation_rows, or add {split} rows")
        own_rows = rows[share.rank : count * share.num_replicas : share.num_replicas]
        data = ExampleRows(examples, own_rows, length_multiple=self._length_multiple)
        return self._loader(data, batch_size=settings.batch_size)
