"""The settings of LayerSkipModule for exit blocks. Tested by tests/integration/test_exit_blocks.py."""

from dataclasses import dataclass
from typing import get_args

from transformers import PreTrainedConfig

from app.errors import ConfigError, check_choice, check_early_exit, check_range
from app.layerskip.distillation import DistillationLoss
from app.model.exit_block import ExitBlockStart, source_layers


@dataclass(frozen=True)
class ExitBlockSettings:
    """Exit blocks that are trained while the model stays as it is (method card, "Exit blocks and distillation").

    Args:
        exits: Number of blocks A, 0 or more, for each exit layer E in 1..num_layers - 1; E + A is at most num_layers.
        start: What the blocks begin as: exit, blocks E.. of the model; last, its last ones; or affine, the affine map
            that brings the state at the exit closest to the final normed one, which then learns with the blocks.
        loss: cross_entropy (of the text), kl, total_variation or lk (of the full model's distribution).
        start_tokens: Tokens of the training data that the affine map is found from, 1 or more.
        vocabulary: File of the token ids that drafts will be chosen from (draft_vocabulary.json of a model, or a token
            map of SGLang). The loss then is that given that the token is one of them, and the head, most of a step's
            work in small models, has only their rows; validation scores drafts from these ids. By default all;
            cross_entropy knows no other.
    """

    exits: dict[int, int]
    start: ExitBlockStart = "last"
    loss: DistillationLoss = "lk"
    vocabulary: str | None = None
    start_tokens: int = 65536

    def __post_init__(self) -> None:
        check_choice("exit_blocks.start", self.start, get_args(ExitBlockStart))
        check_range("exit_blocks.start_tokens", self.start_tokens, low=1)
        check_choice("exit_blocks.loss", self.loss, get_args(DistillationLoss))
        if self.vocabulary is not None and self.loss == "cross_entropy":
            allowed = "no file with exit_blocks.loss cross_entropy"
            raise ConfigError("exit_blocks.vocabulary", got=self.vocabulary, allowed=allowed)
        if not self.exits:
            raise ConfigError("exit_blocks.exits", got=self.exits, allowed="one exit or more, as {exit layer: blocks}")

    @property
    def affine(self) -> frozenset[int]:
        return frozenset(self.exits) if self.start == "affine" else frozenset()

    def sources(self, num_layers: int) -> dict[int, list[int]]:
        """Which of the model's blocks each exit's begin as; ConfigError if it has no such exit or too few blocks."""
        for exit_layer, num_blocks in self.exits.items():
            check_early_exit("exit_blocks.exits", exit_layer, num_layers=num_layers)
            fix = f"blocks of exit {exit_layer} of {num_layers}"
            check_range("exit_blocks.exits", num_blocks, low=0, high=num_layers - exit_layer, fix=fix)
        return {
            exit_layer: source_layers(num_layers, exit_layer=exit_layer, num_blocks=num_blocks, start=self.start)
            for exit_layer, num_blocks in sorted(self.exits.items())
        }


def refuse_with_exit_blocks(
    config: PreTrainedConfig | None, activation_checkpointing: bool, compile_blocks: bool
) -> None:
    """Raise ConfigError for settings of LayerSkipModule that do not go with exit blocks."""
    if config is not None:
        allowed = "no model.config: exit blocks are for a trained model"
        raise ConfigError("config", got=config.model_type, allowed=allowed, fix="name the model in model.pretrained")
    for field, value in (("activation_checkpointing", activation_checkpointing), ("compile_blocks", compile_blocks)):
        if value:
            raise ConfigError(field, got=True, allowed="false with model.exit_blocks")
