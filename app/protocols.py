"""What the rooms ask of one another: small protocols, so that each room can be tested with a ten-line fake.

It is one long file, so that all that rooms promise one another is found in one place.

Shape legend: `B` sequences, `T` tokens, `D` model width, `V` vocabulary.
An `exit_layer` counts blocks RUN before unembedding: 1..num_layers; num_layers is the full model.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

from torch import Tensor, device

from app.tables import Table

# -- modules, for callbacks ------------------------------------------------------------------------------------------


class Layered(Protocol):
    """A model of L blocks."""

    @property
    def num_layers(self) -> int: ...


@runtime_checkable
class LayerDropoutHost(Layered, Protocol):
    """A model in training whose blocks can be dropped.

    `dropout_rates` are those in use, one for each block. `dropped_shares` has, for each block, the share of samples
    that skipped it in the latest training micro-batch.
    """

    @property
    def dropout_rates(self) -> tuple[float, ...]: ...
    @property
    def dropped_shares(self) -> tuple[float, ...]: ...
    def set_dropout_rates(self, rates: Sequence[float], *, rescale: bool = False) -> None:
        """Use `rates[layer_idx]` in [0, 1) from the next forward on; `rescale` the kept residuals by 1/(1-p).

        Only one callback may do so in a step.
        """


@runtime_checkable
class EarlyExitHost(Layered, Protocol):
    """A model in training whose loss is a weighted sum over exits; `exit_weights` has those in use, by exit layer."""

    @property
    def exit_weights(self) -> Mapping[int, float]: ...
    def set_exit_weights(self, weights: Mapping[int, float], *, distil: bool = False) -> None:
        """Use these exits and weights from the next forward on; the weights sum to 1.

        With `distil`, exits below the last learn the full model's distribution, and not the text. Only one callback
        may do so in a step, and alike in all micro-batches of a step.
        """


class MicroBatchWork(NamedTuple):
    """What a training micro-batch is about to compute on this rank; what is by block has an entry for each."""

    batch_size: int
    dropout_rates: tuple[float, ...]  # p(l, t), by block
    kept_samples: tuple[tuple[int, ...], ...] | None  # the samples that go through it, by block; None: all
    most_kept: tuple[int, ...] | None  # how many go through it on the rank with the most samples, by block; None: all
    exit_weights: tuple[tuple[int, float], ...]  # (exit_layer, w(t, l)) of the exits that are on, ascending


@runtime_checkable
class WorkHost(Protocol):
    """A model in training that shows what it is about to compute."""

    def watch_work(self, watcher: Callable[[MicroBatchWork], None]) -> None:
        """Call `watcher` with the work of every later training micro-batch, before its forward."""


@runtime_checkable
class ArchitectureOwner(Protocol):
    """A module that knows transformers' configuration of its model."""

    @property
    def config(self) -> Any: ...


@runtime_checkable
class ExitMonitorHost(Layered, Protocol):
    """A model whose validation step returns hidden states at chosen exits.

    Its `validation_step` returns {"hidden_by_exit": {exit_layer: normed hidden [B, T, D]}, "labels": [B, T]}.
    """

    def monitor_exits(self, exit_layers: Sequence[int]) -> None:
        """Return these exits, too, from every later validation step."""

    def head(self, normed_BTD: Tensor) -> Tensor:
        """LM head alone: normed hidden states [B, T, D] -> logits [B, T, V]."""


@runtime_checkable
class LogHost(Layered, Protocol):
    """A module that lets a callback choose which of its metrics the loggers get."""

    @property
    def monitored_exits(self) -> Collection[int]: ...

    def leave_out_of_logs(self, is_left_out: Callable[[str], bool]) -> None:
        """Log the metrics whose names `is_left_out` holds of for callbacks alone, and in training at logged steps."""
        ...


@runtime_checkable
class FrozenModelHost(Protocol):
    """A module that may train exit blocks or LoRA adapters, and then leaves its model's own weights as they are."""

    peft: Any  # app.model.lora.LoraSettings, or None

    @property
    def has_exit_blocks(self) -> bool: ...
    @property
    def exit_sources(self) -> Mapping[int, Sequence[int]]: ...  # exits that have blocks -> those they began as


class DraftSize(NamedTuple):
    """What a draft runs beside the first E blocks, in blocks of the model by counts of parameters."""

    head_blocks: float  # H
    draft_head_blocks: float  # H_d, of the rows of the LM head that drafts use
    exit_blocks: float  # A: blocks of the exit's own, and its affine map


@runtime_checkable
class DraftHost(Protocol):
    """A module that tells what drafts from its exits run, and which token ids they are chosen from; None for all."""

    @property
    def draft_ids(self) -> Tensor | None: ...
    def draft_size(self, exit_layer: int) -> DraftSize: ...


@runtime_checkable
class DecodingHost(Layered, Protocol):
    """A module that can lend its current weights for decoding."""

    def exitable_decoder(self) -> "ExitableDecoder":
        """A view on the live weights; it must neither copy nor change them."""


@runtime_checkable
class EndOwner(Protocol):
    """A module whose model has tokens that end a text, beside that of the data's tokenizer."""

    @property
    def end_token_ids(self) -> Sequence[int]: ...


# -- models, for decoding --------------------------------------------------------------------------------------------


class DecoderCache(Protocol):
    """Keys and values of every block for the tokens processed so far; blocks and sequences may differ in length.

    Lengths are plain integers, so that reading one does not wait for the device.
    """

    def lengths(self, layer_idx: int) -> tuple[int, ...]:
        """Positions stored for block `layer_idx`, for each of the B sequences."""

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget in all blocks every position >= lengths[b] of sequence b; no memory moves."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""

    def join(self, other: Self) -> None:
        """Take over the sequences of another cache of this decoder, as rows after one's own."""


class StaticDecoderCache(DecoderCache, Protocol):
    """The same with room for `capacity` positions that never moves, for rounds that are fixed sequences of kernels.

    A pass over the prompts of all rows comes first. From the first `begin_round` on, row b's new positions begin at
    `lengths_B[b]`, which whoever decodes sets on the device. Every pass must find room within the capacity.
    """

    capacity: int
    lengths_B: Tensor

    def clear(self) -> None:
        """Forget everything, so that a pass over the prompts of all rows can follow."""

    def begin_round(self) -> None:
        """Let every block go on at `lengths_B`; what was stored there or beyond is forgotten."""

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions, elsewhere in memory."""


class ExitableDecoder(Layered, Protocol):
    """A decoder whose blocks can be run in spans, so that drafting and verifying share one cache.

    Positions are 0..max_length-1 and token ids, on `device`, 0..vocab_size-1. `block_size`, `head_size` and
    `draft_head_size` count the parameters of one block, of the LM head, and of the rows of it that drafts use.
    """

    @property
    def max_length(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def device(self) -> device: ...
    @property
    def block_size(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def draft_head_size(self) -> int: ...
    @property
    def draft_vocabulary(self) -> Sequence[int] | None:
        """The token ids that drafts are chosen from, the most useful ones first; None where these are all."""

    @property
    def draft_ids(self) -> Tensor | None:
        """The same ids [V'] in ascending order, on `device`."""

    def use_draft_vocabulary(self, token_ids: Sequence[int] | None) -> None:
        """Let drafts be chosen from these token ids alone; None stands for all."""

    def exit_span(self, exit_layer: int) -> range:
        """The blocks that this exit has of its own, as `run_blocks` numbers them; empty where it has none.

        Their keys and values are in the same cache. They run on the states that leave block `exit_layer` - 1.
        """

    def exit_block_size(self, exit_layer: int) -> int:
        """Parameters of the blocks and the affine map that this exit has of its own; 0 where it has none."""

    def new_cache(self, *, batch_size: int, capacity: int) -> DecoderCache:
        """An empty cache for `batch_size` sequences with room for `capacity` positions each (it may grow)."""

    kept_program: Any  # what static rounds of the latest request were recorded in, for the next one like it

    def new_static_cache(self, *, batch_size: int, capacity: int) -> StaticDecoderCache:
        """The same of a size and place that stay."""

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, D] that enter block 0."""

    def run_blocks(self, hidden_BTD: Tensor, *, start: int, stop: int, cache: DecoderCache) -> Tensor:
        """Run blocks start..stop-1 on T new positions of each sequence, which begin at `cache.lengths(start)`.

        Appends their keys and values to the cache; returns the pre-norm hidden states [B, T, D].
        """

    def unembed(self, hidden_BTD: Tensor, *, exit_layer: int | None = None) -> Tensor:
        """Norm of an exit, by default the final one, and LM head: pre-norm states [B, T, D] -> logits [B, T, V]."""

    def draft_logits(self, hidden_BTD: Tensor, *, exit_layer: int) -> Tensor:
        """The same for drafts, with logits [B, T, V'] of `draft_ids` alone where these are not all."""


# -- datamodules -----------------------------------------------------------------------------------------------------


@runtime_checkable
class TokenizerOwner(Protocol):
    """A datamodule that knows its tokenizer, of transformers, so that checkpoints can carry it."""

    @property
    def tokenizer(self) -> Any: ...


@runtime_checkable
class CorpusOwner(TokenizerOwner, Protocol):
    """A datamodule of packed rows of `seq_len` tokens. A batch's `source` is an index of `source_names`."""

    @property
    def seq_len(self) -> int: ...
    @property
    def source_names(self) -> Sequence[str]: ...


@runtime_checkable
class ResumableData(Protocol):
    """A datamodule that a run can resume with."""

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise the ConfigError or CheckpointError that `load_state_dict` would raise; restores nothing."""


class SourceStatistics(NamedTuple):
    """What one source of a corpus has delivered to training on this rank."""

    tokens: int  # without padding
    rows: int
    epochs: float  # passes over the source, the mean over the rank's parts of it
    seen: int  # records read
    skipped: int  # bad records among those


@runtime_checkable
class StreamOwner(Protocol):
    """A datamodule that mixes sources by weight and counts what they deliver.

    `source_weights` has the share of tokens asked of each source, and sums to 1.
    """

    @property
    def seq_len(self) -> int: ...
    @property
    def source_weights(self) -> Mapping[str, float]: ...
    def source_statistics(self) -> Mapping[str, SourceStatistics]: ...


@runtime_checkable
class StateOwner(Protocol):
    """A datamodule whose batches have states that a frozen model left, for exit blocks to be trained on.

    A batch's `states` [B, T, S, D] has, at each token, the pre-norm states leaving block E - 1 for each E of
    `state_layers`, ascending, and then the state after the final norm: S = len(state_layers) + 1. `model_hash` is
    app.model.weights_hash.weights_hash of all blocks (exit_layer = num_layers), since that last state depends on them.
    """

    @property
    def state_layers(self) -> Sequence[int]: ...
    @property
    def model_hash(self) -> str: ...


@runtime_checkable
class PromptOwner(Protocol):
    """A datamodule that offers fixed held-out prompts."""

    def validation_prompts(self, count: int, length: int) -> list[list[int]]:
        """`count` prompts of `length` token ids from held-out documents, the same at every call."""


class GenerationExample(NamedTuple):
    """A held-out row of a task: the model's prompt, and what it should write."""

    prompt: list[int]  # token ids, at least one
    reference: str  # the text of the right answer, in the same form as the model's
    group: str  # by which results are reported, e.g. a domain


@runtime_checkable
class ExampleOwner(TokenizerOwner, Protocol):
    """A datamodule of a task that is scored on what the model generates, in the format that `target_format` names."""

    @property
    def target_format(self) -> str: ...
    def generation_examples(self, stage: str, count: int) -> list[GenerationExample]:
        """`count` shuffled rows of stage `validate` or `test`, fewer if there are fewer; the same at every call."""

    def answer(self, tokens: Sequence[int]) -> str:
        """The text of generated token ids, up to the end of the answer, without special tokens."""


@runtime_checkable
class Reportable(Protocol):
    """A callback with something to show when the run is over."""

    def report(self) -> Table | None:
        """A table of results, or None when nothing was measured."""
