"""What callbacks that decode in validation share. Tested by tests/distributed/test_validation_decoding.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from app.checkpoints.entries import SavedEntry
from app.checkpoints.integrity import saved_step
from app.errors import ConfigError, check_early_exits, check_range
from app.model.parallel import unsharded
from app.protocols import DecodingHost, EndOwner, ExitableDecoder, TokenizerOwner
from app.text.text_tokens import listed_ends

Part = TypeVar("Part")


class EveryNthValidation(Callback):
    """Measure at the end of every n-th validation of a fit, and of each validation and test outside of fits.

    Training is not touched: decoding uses no randomness and a cache of its own, and every submodule gets its mode
    back. Weights are used as they are stored, without autocast; under FSDP2 they are gathered once, in its compute
    dtype. If a measurement fails on one rank, all raise. A rank that dies, or fails while weights are gathered, leaves
    the others in a collective, which gloo ends at once and NCCL after the process group's timeout. The subclasses
    describe the arguments.
    """

    stages: ClassVar[tuple[str, ...]] = ("fit", "validate", "test")  # in which the callback measures

    def __init__(self, *, every_n_validations: int) -> None:
        check_range("every_n_validations", every_n_validations, low=1)
        self.every_n_validations = every_n_validations
        self._validations = 0  # in all fits, without sanity checks

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations so far, so that a resumed run keeps its rhythm."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = SavedEntry(state_dict, "callbacks", self.state_key).mapping(("validations",))
        self._validations = saved["validations"].count()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in self.stages:
            self.check_host(pl_module)
            self.check_data(trainer, pl_module)

    def check_host(self, pl_module: LightningModule) -> None:
        """Raise ConfigError unless the module can decode; this needs no data."""
        if not isinstance(pl_module, DecodingHost):
            raise ConfigError("model", got=type(pl_module).__name__, allowed="a module with exitable_decoder()")

    def check_data(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ConfigError unless the datamodule has what is measured on."""
        raise NotImplementedError

    def measure(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Measure and log, on all ranks, in stage `validate` or `test`."""
        raise NotImplementedError

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer):
            self.measure(trainer, pl_module, "validate")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "test" in self.stages:
            self.measure(trainer, pl_module, "test")

    def _is_due(self, trainer: Trainer) -> bool:
        """Tell whether to measure now; count this validation if it belongs to a fit."""
        if trainer.sanity_checking:
            return False
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        self._validations += 1
        return self._validations % self.every_n_validations == 0

    def _eos_token_ids(self, trainer: Trainer, pl_module: LightningModule) -> tuple[int, ...]:
        """Return all ids that end a text of the exported model: the model's own, and that of the data's tokenizer."""
        datamodule = datamodule_of(trainer)
        own = pl_module.end_token_ids if isinstance(pl_module, EndOwner) else ()
        trained = listed_ends(datamodule.tokenizer.eos_token_id) if isinstance(datamodule, TokenizerOwner) else ()
        return tuple(dict.fromkeys((*own, *trained)))


class DecodingValidation(EveryNthValidation):
    """Decode at the end of every n-th validation; ranks share the work and stop at the time limit by themselves."""

    def __init__(
        self,
        *,
        exit_layers: list[int],
        num_draft_tokens: list[int],
        every_n_validations: int,
        max_new_tokens: int,
        time_limit_seconds: float,
    ) -> None:
        check_range("exit_layers", min(exit_layers, default=0), low=1, fix="list at least one")
        check_range("num_draft_tokens", min(num_draft_tokens, default=1), low=1)
        super().__init__(every_n_validations=every_n_validations)
        check_range("max_new_tokens", max_new_tokens, low=2)
        check_range("time_limit_seconds", time_limit_seconds, low=0.0)
        self.exit_layers, self.num_draft_tokens = tuple(exit_layers), tuple(num_draft_tokens)
        self.max_new_tokens, self.time_limit_seconds = max_new_tokens, time_limit_seconds

    def check_host(self, pl_module: LightningModule) -> None:
        """Raise ConfigError unless the module can decode, and draft from the exits."""
        super().check_host(pl_module)
        assert isinstance(pl_module, DecodingHost)
        instead = f"take {type(self).__name__} out of trainer.callbacks"
        check_early_exits(self.exit_layers, num_layers=pl_module.num_layers, instead=instead)


def step_of(trainer: Trainer) -> int | None:
    """Return the optimizer steps behind the weights that are measured; None if no run is known to have trained them.

    Outside of fits, where Lightning says 0, these are the steps of the checkpoint.
    """
    if trainer.state.fn == TrainerFn.FITTING:
        return trainer.global_step
    return trainer.global_step or None if trainer.ckpt_path is None else saved_step(Path(trainer.ckpt_path))


def datamodule_of(trainer: Trainer) -> object:
    """Return the trainer's datamodule, or None."""
    return trainer.datamodule  # type: ignore[attr-defined]  # set by the data connector


@contextmanager
def lent_decoder(pl_module: LightningModule) -> Iterator[ExitableDecoder]:
    """The module's whole weights in eval mode, to decode with inside the block; all ranks enter together."""
    assert isinstance(pl_module, DecodingHost)
    with unsharded(pl_module), _eval_mode(pl_module):
        yield pl_module.exitable_decoder()


def on_all_ranks(trainer: Trainer, measure: Callable[[], Part]) -> list[Part]:
    """Measure on every rank; return the results by rank. All ranks wait for one another.

    What `measure` raises on a rank is raised there, and RuntimeError, naming the rank, on the others.
    """
    failure: Exception | None = None
    own: tuple[Part | None, str] = None, ""
    try:
        own = measure(), ""
    except Exception as error:  # raised below, once the other ranks, which would wait for ever, have been told
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
    """Evaluation mode inside the block; afterwards each submodule has its own mode again."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training
