"""Training steps to compare: LayerSkip's, a plain one, and what the open recipes do for an early-exit loss.

The recipes' step is written from its description: a whole forward that keeps all hidden states and drops nothing, then
the logits of each exit in float32, all of them stacked or one exit at a time. A step here is a forward and a backward,
because the optimizer's part is the same for all.

Shape legend: `B` rows, `T` tokens, `E` exits, `D` width, `V` vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

from app.layerskip.early_exit_loss import early_exit_loss
from app.layerskip.exit_weights import normalised_exit_weights
from app.layerskip.layer_dropout import draw_kept_samples
from app.layerskip.schedules import dropout_rates
from app.model.early_exit import EarlyExitModel, LossHead
from app.model_files.open import build_model

Step = Callable[[], float]  # forward, backward; the loss in nats a token


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The settings that all steps of a comparison share."""

    config: PreTrainedConfig  # architecture, initialised at random
    batch_size: int
    seq_len: int  # each row is one document
    dtype: torch.dtype  # dtype of autocast's products; float32 switches autocast off
    exit_layers: tuple[int, ...]  # exits of those steps that have several, the full model among them
    max_dropout_rate: float = 0.1  # p_max of the step that drops as in the paper (exponential over depth)
    early_exit_scale: float = 0.2

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.seq_len

    def weights(self, exit_layers: Sequence[int]) -> dict[int, float]:
        return normalised_exit_weights(exit_layers, num_layers=self.num_layers, early_exit_scale=self.early_exit_scale)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def batch(self) -> dict[str, Tensor]:
        """Token ids, labels and positions [B, T]."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.seq_len)
        tokens, labels = torch.randint(self.config.vocab_size, (2, *shape), generator=generator)
        return {"tokens": tokens, "labels": labels, "positions": torch.arange(self.seq_len).expand(shape)}


def our_steps(settings: StepSettings) -> dict[str, Step]:
    """Steps of this project, on one model: plain, with two unembeddings, LayerSkip's, and with blocks dropped.

    "half the blocks' work" sends a random half of the rows through each block, and "no block" sends none.
    """
    model = build_model(settings.config, seed=0).train()
    network, batch, num_layers = EarlyExitModel(model), settings.batch(), settings.num_layers
    labels, everything = batch["labels"].flatten(), torch.arange(settings.num_tokens)

    def step(exit_layers: Sequence[int], kept: Callable[[], Sequence[Tensor] | None]) -> Step:
        weights = settings.weights(exit_layers)

        def run() -> float:
            with settings.autocast():
                hidden = network.hidden_by_exit(
                    batch["tokens"],
                    batch["positions"],
                    weights,
                    kept=kept(),
                    scales=[1.0] * num_layers,
                    positions=everything,
                )
                loss = early_exit_loss(hidden, labels, weights, network.weighted_losses)
            loss.weighted_sum.backward()  # type: ignore[no-untyped-call]
            model.zero_grad()
            return loss.weighted_sum.item() / settings.num_tokens

        return run

    rates = dropout_rates(0, num_layers=num_layers, max_dropout_rate=settings.max_dropout_rate, total_steps=None)
    steps = count()

    def as_in_the_paper() -> Sequence[Tensor]:
        key = {"seed": 0, "step": next(steps), "micro_batch": 0}
        return draw_kept_samples(rates, batch_size=settings.batch_size, **key).by_block

    def half() -> Sequence[Tensor]:
        return [
            torch.randperm(settings.batch_size)[: settings.batch_size // 2].sort().values for _ in range(num_layers)
        ]

    full, two = (num_layers,), (num_layers // 2, num_layers)
    return {
        "plain": step(full, lambda: None),
        "two unembeddings": step(two, lambda: None),
        "LayerSkip": step(settings.exit_layers, as_in_the_paper),
        "LayerSkip, nothing dropped": step(settings.exit_layers, lambda: None),
        "plain, half the blocks' work": step(full, half),
        "plain, no block": step(full, lambda: [torch.arange(0)] * num_layers),
    }


def recipe_steps(settings: StepSettings) -> dict[str, Step]:
    """Transformers' plain step, and the recipes' two ways of an early-exit loss, on one untouched model."""
    model, batch = build_model(settings.config, seed=0).train(), settings.batch()
    weights = settings.weights(settings.exit_layers)
    labels = batch["labels"].flatten()

    decoder, head = model.get_decoder(), model.get_output_embeddings()

    def hidden_states(**options: bool) -> Any:
        return decoder(batch["tokens"], position_ids=batch["positions"], use_cache=False, **options)

    def logits_by_exit() -> dict[int, Tensor]:
        states = hidden_states(output_hidden_states=True).hidden_states
        normed = {e: states[e] if e == settings.num_layers else decoder.norm(states[e]) for e in weights}
        return {e: head(hidden) for e, hidden in normed.items()}

    def plain() -> Tensor:
        logits = head(hidden_states().last_hidden_state)
        return F.cross_entropy(logits.float().flatten(0, 1), labels)

    def stacked() -> Tensor:
        logits_EBTV = torch.stack([logits.float() for logits in logits_by_exit().values()])
        losses = F.cross_entropy(logits_EBTV.flatten(0, 2), labels.repeat(len(weights)), reduction="none")
        return torch.tensor(list(weights.values())) @ losses.view(len(weights), -1).mean(dim=1)

    def exit_by_exit() -> Tensor:
        total = torch.zeros(())
        for exit_layer, logits in logits_by_exit().items():
            total = total + weights[exit_layer] * F.cross_entropy(logits.float().flatten(0, 1), labels)
        return total

    def step(loss: Callable[[], Tensor]) -> Step:
        def run() -> float:
            with settings.autocast():
                value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            model.zero_grad()
            return value.item()

        return run

    return {
        "transformers, plain": step(plain),
        "recipe, logits stacked": step(stacked),
        "recipe, exit by exit": step(exit_by_exit),
    }


def time_steps(steps: Mapping[str, Step], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of every step in each repeat. The steps take turns, and each runs once before anything counts."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started = perf_counter()
            step()
            seconds[name].append(perf_counter() - started)
    return seconds


def exit_loss(num_exits: int, num_tokens: int, vocab_size: int, width: int) -> Step:
    """Forward and backward of the early-exit loss alone, in float32, from hidden states made beforehand."""
    torch.manual_seed(0)
    head = LossHead(width, vocab_size, bias=False)
    hidden = {exit_layer: torch.randn(num_tokens, width, requires_grad=True) for exit_layer in range(num_exits)}
    labels = torch.randint(vocab_size, (num_tokens,))

    def run() -> float:
        loss = early_exit_loss(hidden, labels, dict.fromkeys(hidden, 1 / num_exits), head)
        loss.weighted_sum.backward()  # type: ignore[no-untyped-call]
        return loss.weighted_sum.item() / num_tokens

    return run


def one_step(name: str, settings: StepSettings) -> Step:
    """The step of this name from `recipe_steps` or `our_steps`, without building the other's model."""
    of_recipes = name.startswith(("recipe", "transformers"))
    return (recipe_steps if of_recipes else our_steps)(settings)[name]
