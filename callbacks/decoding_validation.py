"""What callbacks that decode in validation have in common: when, with which weights, and on which ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from app.checkpoints.entries import SavedEntries
from app.errors import ConfigError, check_range
from app.model.parallel import unsharded
from app.protocols import DecodingHost, EndOwner, ExitableDecoder, TokenizerOwner
from app.text.text_tokens import listed_ends

Part = TypeVar("Part")


class DecodingValidation(Callback):
    """Decodes at the end of every n-th validation.

    Training is not touched: no randomness is used, the cache is its own, and the mode of every submodule is put back.
    Weights are used as they are stored, without autocast; under FSDP2 they are gathered once, in its compute dtype.

    If decoding fails on one rank, all raise. A rank that dies, or fails while weights are gathered, leaves the others
    in a collective: gloo ends it at once, NCCL after the process group's timeout.

    Args:
        every_n_validations: Measure at every n-th validation of a fit, at least 1; outside of fits always.
    """

    def __init__(self, *, every_n_validations: int) -> None:
        check_range("every_n_validations", every_n_validations, low=1)
        self.every_n_validations = every_n_validations
        self._validations = 0  # of all fits, sanity checks not counted

    def state_dict(self) -> dict[str, Any]:
        """The number of validations so far, so that a resumed run keeps its rhythm."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` saved."""
        saved, entry = SavedEntries(), ("callbacks", self.state_key)
        state = saved.keys(entry, state_dict, ("validations",))
        self._validations = saved.count((*entry, "validations"), state["validations"])

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether to measure now; counts this validation if it belongs to a fit."""
        if trainer.sanity_checking:
            return False
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        self._validations += 1
        return self._validations % self.every_n_validations == 0


def check_decoding_host(pl_module: LightningModule, exit_layers: Sequence[int]) -> None:
    """ConfigError unless the module can decode, and draft from these exits."""
    if not isinstance(pl_module, DecodingHost):
        raise ConfigError("model", got=type(pl_module).__name__, allowed="a module with exitable_decoder()")
    num_layers = pl_module.num_layers
    if wrong := [layer for layer in exit_layers if layer >= num_layers]:
        allowed = f"1..{num_layers - 1} for a {num_layers}-layer model"
        raise ConfigError("exit_layers", got=list(exit_layers), allowed=allowed, fix=f"{wrong} cannot draft")


def datamodule_of(trainer: Trainer) -> object:
    """The datamodule, or None."""
    return trainer.datamodule  # type: ignore[attr-defined]  # set by the data connector


def eos_token_ids(trainer: Trainer, pl_module: LightningModule) -> tuple[int, ...]:
    """Every id that ends a text of the model once it is exported: its own ends, and the end of the data's tokenizer."""
    datamodule = datamodule_of(trainer)
    own = pl_module.end_token_ids if isinstance(pl_module, EndOwner) else ()
    trained = listed_ends(datamodule.tokenizer.eos_token_id) if isinstance(datamodule, TokenizerOwner) else ()
    return tuple(dict.fromkeys((*own, *trained)))


@contextmanager
def lent_decoder(pl_module: LightningModule) -> Iterator[ExitableDecoder]:
    """The module's whole weights in eval mode, to decode with inside the block; all ranks enter together."""
    assert isinstance(pl_module, DecodingHost)
    with unsharded(pl_module), _eval_mode(pl_module):
        yield pl_module.exitable_decoder()


def on_all_ranks(trainer: Trainer, measure: Callable[[], Part]) -> list[Part]:
    """What `measure` gives on every rank, by rank; all wait for one another.

    Raises:
        Exception: What `measure` raised here; a RuntimeError that names the ranks if it raised elsewhere alone.
    """
    failure: Exception | None = None
    own: tuple[Part | None, str] = None, ""
    try:
        own = measure(), ""
    except Exception as error:  # first tell the other ranks, which would wait for ever
        failure, own = error, (None, f"{type(error).__name__}: {error}")
    gathered: list[Any] = [own]
    if trainer.world_size > 1:
        gathered = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, own)
    if failure is not None:
        raise failure
    if errors := {rank: error for rank, (_, error) in enumerate(gathered) if error}:
        raise RuntimeError(f"decoding in validation failed on other ranks: {errors}")
    return [part for part, _ in gathered]


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each submodule's own mode after."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training
