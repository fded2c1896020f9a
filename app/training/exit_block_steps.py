"""What a module does that trains exit blocks of a frozen model instead of the model.

Shape legend: `B` rows, `T` tokens, `S` states of a token, `D` model width. Tested by
tests/integration/test_exit_blocks.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from app.errors import ConfigError
from app.layerskip.distillation import divergence_loss
from app.layerskip.early_exit_loss import IGNORE_INDEX, EarlyExitLoss, early_exit_loss
from app.layerskip.least_squares import AffineFit
from app.model.exact_tables import keep_tables_exact
from app.model.exit_block import ExitBlock, exit_blocks_of
from app.model.head_loss import Teacher
from app.model.weights_hash import weights_hash
from app.model_files.draft_vocabulary import read_draft_vocabulary
from app.protocols import DraftSize, ExitableDecoder, StateOwner
from app.spans.decoder import SpanDecoder
from app.text.text_tokens import listed_ends
from app.training.batch import GivenBatch
from app.training.evaluation_steps import EvaluationSteps
from app.training.exit_block_settings import ExitBlockSettings


class ExitBlockSteps(EvaluationSteps):
    """Trains and measures the exit blocks of a frozen model; without `settings`, `exit_blocks` is None."""

    model: PreTrainedModel | None  # None until Lightning asks for it

    def __init__(self, config: PreTrainedConfig, settings: ExitBlockSettings | None) -> None:
        super().__init__(config)
        self.exit_blocks: nn.ModuleDict | None = None
        self._exit_settings = settings
        self._sources = settings.sources(self.num_layers) if settings else {}
        self._read_states_of(self._sources)
        self._token_ids_V: Tensor | None = None
        self._start_is_due = bool(settings and settings.affine)  # the affine maps are not found yet

    @property
    def trained(self) -> nn.Module:
        """What the optimizer moves: the exit blocks, or else the model."""
        assert self.model is not None
        return self.exit_blocks or self.model

    @property
    def has_exit_blocks(self) -> bool:
        return self._exit_settings is not None

    @property
    def exit_sources(self) -> dict[int, list[int]]:
        """Which of the model's blocks those of each exit began as; {} without exit blocks."""
        return self._sources

    @property
    def own_blocks(self) -> dict[int, ExitBlock]:
        """The exit blocks by exit layer; {} without."""
        return {int(layer): cast(ExitBlock, block) for layer, block in (self.exit_blocks or {}).items()}

    @property
    def draft_ids(self) -> Tensor | None:
        """The token ids [V'] that drafts will be chosen from; None where these are all."""
        return None if self._token_ids_V is None else self._token_ids_V.to(self.device)

    def draft_size(self, exit_layer: int) -> DraftSize:
        """Tell what a draft from this exit runs beside the first E blocks."""
        assert self.model is not None
        block = sum(parameter.numel() for parameter in self.model.get_decoder().layers[0].parameters())
        head: Tensor = self.model.get_output_embeddings().weight
        own, ids_V = self.own_blocks.get(exit_layer), self._token_ids_V
        rows = len(head if ids_V is None else ids_V)
        return DraftSize(
            head_blocks=head.numel() / block,
            draft_head_blocks=rows * head.shape[1] / block,
            exit_blocks=own.size / block if own else 0.0,
        )

    def exitable_decoder(self) -> ExitableDecoder:
        """A view on the live weights, which drafts as the exit blocks learn to (app.protocols.DecodingHost)."""
        assert self.model is not None
        decoder = SpanDecoder(self.model, exit_blocks=self.own_blocks)
        decoder.use_draft_vocabulary(None if self.draft_ids is None else self.draft_ids.tolist())
        return decoder

    def check_exit_blocks(self, *, spread: bool) -> None:
        """Raise ConfigError if exit blocks are to learn from a model that is `spread` over devices in parts."""
        if self.has_exit_blocks and spread:
            got, allowed = type(self.trainer.strategy).__name__, "one device or ddp with model.exit_blocks"
            fix = "a frozen model has neither gradients nor optimizer states: each device holds all of it"
            raise ConfigError("trainer.strategy", got=got, allowed=allowed, fix=fix)

    def freeze_model(self, model: PreTrainedModel) -> None:
        """Freeze a model and make its exit blocks; before the classes of its blocks are swapped."""
        assert self._exit_settings is not None
        self.exit_blocks = exit_blocks_of(model, self._sources, affine=self._exit_settings.affine)
        if file := self._exit_settings.vocabulary:
            vocab_size = model.config.get_text_config().vocab_size
            ends = listed_ends(model.generation_config.eos_token_id)
            self._token_ids_V = torch.tensor(read_draft_vocabulary(Path(file), vocab_size=vocab_size, ends=ends))
        model.requires_grad_(False)
        keep_tables_exact(self.exit_blocks)

    # -- curricula, which exit blocks do not have --------------------------------------------------------------------

    @property
    def exit_weights(self) -> Mapping[int, float]:
        return dict.fromkeys(self._sources, 1 / len(self._sources)) if self._sources else super().exit_weights

    def set_exit_weights(self, weights: Mapping[int, float], *, distil: bool = False) -> None:
        self.check_model_learns("early_exit.curriculum", got=dict(weights), allowed="none")
        super().set_exit_weights(weights, distil=distil)

    def set_dropout_rates(self, rates: Sequence[float], *, rescale: bool = False) -> None:
        self.check_model_learns("layer_dropout.max_dropout_rate", got=max(rates, default=0.0), allowed="0")
        super().set_dropout_rates(rates, rescale=rescale)

    def check_model_learns(self, field: str, *, got: object, allowed: str) -> None:
        """Raise ConfigError for a setting of the recipe, which would train the model, where the model is frozen."""
        if self.has_exit_blocks:
            fix = "the model of exit blocks is frozen"
            raise ConfigError(field, got=got, allowed=f"{allowed} with model.exit_blocks", fix=fix)

    # -- steps -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not self.has_exit_blocks:
            return
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, StateOwner):
            if not {*self._sources} <= {*data.state_layers}:
                allowed = f"{list(self._sources)}, those of model.exit_blocks, and any others"
                raise ConfigError("data.exit_layers", got=list(data.state_layers), allowed=allowed)
            self._read_states_of(data.state_layers)

    def _read_states_of(self, exit_layers: Iterable[int]) -> None:
        """Read from batches the states of these exits, ascending, and the final one."""
        self._state_layers = (*exit_layers, self.num_layers)
        self._num_states = len(self._state_layers) if self.has_exit_blocks else 0

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self._start_is_due:  # before a validation looks at what is there at the start
            self._find_affine_starts()

    def end_start(self) -> None:
        """Keep the exit blocks as they are: a checkpoint brings what they began as, and what they learned."""
        self._start_is_due = False

    @torch.no_grad()
    def _find_affine_starts(self) -> None:
        """Let each exit block begin as the map from its states to the final normed ones, on the first training rows.

        Every rank looks at its own rows, and takes the map that the first one found.
        """
        assert self._exit_settings is not None
        assert self.model is not None
        if (data := getattr(self.trainer, "datamodule", None)) is None:
            raise ConfigError("exit_blocks.start", got="affine", allowed="exit or last without a datamodule")
        trains = self.model.training
        self.model.eval()  # as it will be in training; until then Lightning warns of modules in eval mode
        fits = {exit_layer: AffineFit(self.config.get_text_config().hidden_size) for exit_layer in self._sources}
        left = self._exit_settings.start_tokens
        for given in data.train_dataloader():
            columns = {name: each.to(self.device) for name, each in given.items() if isinstance(each, Tensor)}
            batch = self._checked(cast(GivenBatch, columns), "train")
            targets = (batch["labels"].flatten() != IGNORE_INDEX).nonzero()[:left, 0]
            states = self._states(batch, self._sources)
            for exit_layer, fit in fits.items():
                fit.add(_pick(states[exit_layer], targets), _pick(states[self.num_layers], targets))
            left -= len(targets)
            if left <= 0:
                break
        for exit_layer, fit in fits.items():
            self.own_blocks[exit_layer].begin_as(*self.trainer.strategy.broadcast(fit.solve()))
        self.model.train(trains)
        self.end_start()

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.has_exit_blocks:  # what the model says is what it says in use; Lightning keeps modes from here on
            assert self.model is not None
            self.model.eval()

    def _checked(self, given: GivenBatch, loop: str) -> GivenBatch:
        is_first = loop not in self._loops_checked
        batch = super()._checked(given, loop)
        if is_first and self.has_exit_blocks and "states" in batch:
            self._check_states_are_ours()
        return batch

    def _check_states_are_ours(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, StateOwner):
            allowed = "with a datamodule that tells whose they are (app.protocols.StateOwner)"
            raise ConfigError("batch.states", got=f"of {type(data).__name__}", allowed=allowed)
        assert self.model is not None
        if (expected := weights_hash(self.model.state_dict(), exit_layer=self.num_layers)) != data.model_hash:
            got, allowed = f"states of model {data.model_hash[:12]}", f"those of model.pretrained, {expected[:12]}"
            raise ConfigError("data.pretrained", got=got, allowed=allowed, fix="fill another cache_dir for this model")

    def exit_block_loss(self, batch: GivenBatch) -> EarlyExitLoss:
        """The loss of the settings, summed over label tokens; exits count alike. Only exit blocks get a gradient."""
        assert self._exit_settings is not None
        labels = batch["labels"].flatten()
        targets = (labels != IGNORE_INDEX).nonzero()[:, 0]  # no logits where there is nothing to learn
        states = self._states(batch, self._sources)
        hidden = {layer: _pick(normed, targets) for layer, normed in self._own_hidden(states, batch).items()}
        head = self._network.weighted_losses
        if (loss := self._exit_settings.loss) != "cross_entropy":
            losses = [partial(divergence_loss, loss)] * len(hidden)
            teacher = Teacher(_pick(states[self.num_layers], targets), losses)
            head = partial(head, teacher=teacher, token_ids=self.draft_ids)
        return early_exit_loss(hidden, labels[targets], self.exit_weights, head)

    def _states(self, batch: GivenBatch, exit_layers: Iterable[int]) -> dict[int, Tensor]:
        """The states before any norm at these exits, and the final normed state: from the batch if it has them all."""
        wanted = {*exit_layers, self.num_layers}
        if "states" not in batch or not wanted <= {*self._state_layers}:
            return self._network.states(batch["input_ids"], batch["position_ids"], wanted)
        by_exit = zip(self._state_layers, batch["states"].unbind(dim=2), strict=True)
        dtype = next(self.trained.parameters()).dtype
        return {layer: state.to(dtype) for layer, state in by_exit if layer in wanted}

    def _own_hidden(self, states: Mapping[int, Tensor], batch: GivenBatch) -> dict[int, Tensor]:
        """The normed states [B, T, D] of the exits that have blocks of their own."""
        positions = batch["position_ids"]
        return {layer: block(states[layer], positions) for layer, block in self.own_blocks.items() if layer in states}

    def _evaluation_hidden(self, batch: GivenBatch) -> dict[int, Tensor]:
        if not self.has_exit_blocks:
            return super()._evaluation_hidden(batch)
        states = self._states(batch, self._monitored)
        own = self._own_hidden(states, batch)
        return own | {
            layer: state if layer == self.num_layers else self._network.norm(state)
            for layer, state in states.items()
            if layer not in own
        }


def _pick(hidden_BTD: Tensor, positions_N: Tensor) -> Tensor:
    return hidden_BTD.flatten(0, 1).index_select(0, positions_N)
