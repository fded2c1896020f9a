"""Drops blocks of a Hugging Face decoder per sample, and taps its exits.

The modelling code and the state-dict keys stay untouched: decoder blocks and LM head get subclasses of their classes,
the way FSDP2 swaps classes. In evaluation the model computes what it did before.

Shape legend: `E` exits, `B` sequences, `T` tokens, `D` model width, `V` vocabulary, `K` kept samples.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from app.errors import ConfigError
from app.model.class_swap import swap_class
from app.model.config_check import check_plain_head
from app.model.cpu.attention import fast_attention
from app.model.head_loss import Teacher, WeightedTokenLosses, token_losses


@dataclass
class ForwardPlan:
    """What the next forward does; all blocks of a model share one plan."""

    kept: Sequence[Tensor] | None = None  # for each block the kept samples [K]; None keeps all
    scales: Sequence[float] = ()  # for each block the factor on its kept residual
    entered: frozenset[int] = frozenset()  # blocks that run even where this rank keeps no sample
    exit_layers: frozenset[int] = frozenset()
    taps: dict[int, Tensor] = field(default_factory=dict)  # exit_layer -> pre-norm hidden states [B, T, D]


class _Skip(torch.autograd.Function):
    """Identity on the hidden states that gives unused tensors the gradient zero.

    Without it a block that the whole batch skips would leave its parameters' gradients unset. DDP would wait for them,
    and an optimizer treats an unset gradient differently from zero.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *unused: Tensor) -> Tensor:
        ctx.save_for_backward(*unused)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        zeros = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        )
        return (grad, *zeros)


class DroppableBlock(nn.Module):
    """Mixin over a decoder block that drops samples: x_{l+1} = x_l + M f_l(x_l) (arXiv 2404.16710 section 4.1.1)."""

    plan: ForwardPlan
    block_idx: int
    compiled: Callable[..., Tensor] | None = None  # for training (app.model.compiled_blocks)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Skip the block and FSDP's hooks where no rank keeps a sample, and tap the state that leaves the block."""
        kept = self.plan.kept if self.training else None
        if kept is not None and kept[self.block_idx].numel() == 0 and self.block_idx not in self.plan.entered:
            out: Tensor = _Skip.apply(hidden_states, *self.parameters())  # type: ignore[no-untyped-call]
        else:
            out = super().__call__(hidden_states, *args, **kwargs)
        if self.block_idx + 1 in self.plan.exit_layers:
            self.plan.taps[self.block_idx + 1] = out
        return out

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block on the kept samples [B, T, D] and pass the others through unchanged."""
        run: Callable[..., Tensor] = super().forward
        if self.training:
            run = self.compiled or fast_attention(run, hidden_states)
        if not self.training or self.plan.kept is None:
            return run(hidden_states, *args, **kwargs)
        kept, scale = self.plan.kept[self.block_idx], self.plan.scales[self.block_idx]
        batch_size = hidden_states.shape[0]
        if needless := kept.numel() == 0:  # all ranks gather a block's weights together, and another rank needs it
            kept = kept.new_zeros(1)  # a block cannot run on an empty batch

        def pick(value: Any) -> Any:  # masks, position ids and rotary tables follow their samples
            per_sample = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch_size
            return value.index_select(0, kept) if per_sample else value

        if kept.numel() == batch_size:
            entering, out = hidden_states, run(hidden_states, *args, **kwargs)
        else:
            entering = hidden_states.index_select(0, kept)
            out = run(entering, *tree_map(pick, args), **tree_map(pick, kwargs))
        if needless:
            passed_by: Tensor = _Skip.apply(hidden_states, out)  # type: ignore[no-untyped-call]
            return passed_by.clone()  # FSDP refuses views
        if scale != 1.0:
            out = entering + scale * (out - entering)
        return out if kept.numel() == batch_size else hidden_states.index_copy(0, kept, out)


class LossHead(nn.Linear):
    """LM head whose forward also computes the chunked losses, so that FSDP's hooks surround both."""

    def forward(
        self,
        hidden: Tensor | Sequence[Tensor],
        labels: Tensor | None = None,
        weights: Sequence[float] | None = None,
        teacher: Teacher | None = None,
        token_ids: Tensor | None = None,
    ) -> Any:
        """Turn normed hidden states [..., D] into logits [..., V], or with labels [...] into cross entropies [...].

        The cross entropies have no gradient. Given several exits' hidden states and their weights, the result is the
        weighted sum of the exits' losses, which has one, and the losses [E, ...]. They are cross entropies unless
        `teacher` says otherwise, whose hidden states are [..., D], too. With `token_ids` the losses are those given
        that the token is one of them, and labels are indices of these ids.
        """
        if labels is None:
            return super().forward(hidden)  # type: ignore[arg-type]
        exits = [hidden] if isinstance(hidden, Tensor) else hidden
        states = [*exits] if teacher is None else [*exits, teacher.normed]
        rows = [each.flatten(0, -2) for each in states]
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if token_ids is not None:
            weight, bias = weight[token_ids], None if bias is None else bias[token_ids]
        dtype, device = rows[0].dtype, labels.device
        if bias is not None:
            rows, weight = [F.pad(each, (0, 1), value=1.0) for each in rows], torch.cat([weight, bias[:, None]], 1)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if teacher is not None:
            teacher = Teacher(rows.pop(), teacher.losses)
        with torch.autocast(device.type, enabled=False):
            if weights is None:
                (losses,) = token_losses(rows, weight, labels.flatten(), dtype=dtype)
                return losses.view(labels.shape)
            total, losses = WeightedTokenLosses.apply(  # type: ignore[no-untyped-call]
                weight, labels.flatten(), weights, teacher, dtype, *rows
            )
        return total, losses.view(len(exits), *labels.shape)


class EarlyExitModel:
    """Drives a Llama-shaped causal LM with layer dropout and exits; swaps classes of its blocks and head in place.

    Raises:
        ConfigError: The decoder lacks `layers` or `norm`, or the LM head is not linear or changes its logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        decoder, head, config = model.get_decoder(), model.get_output_embeddings(), model.config
        if not (isinstance(getattr(decoder, "layers", None), nn.ModuleList) and hasattr(decoder, "norm")):
            allowed = "a decoder with `layers` and `norm`, such as llama"
            raise ConfigError("model", got=config.model_type, allowed=allowed)
        check_plain_head(config, field="model")
        if type(head) not in (nn.Linear, LossHead):
            got = f"{config.model_type} with {type(head).__name__}"
            raise ConfigError("model", got=got, allowed="a plain linear LM head")
        self._decoder, self._head, self._plan = decoder, head, ForwardPlan()
        for block_idx, block in enumerate(decoder.layers):
            swap_class(block, DroppableBlock)
            block.plan, block.block_idx = self._plan, block_idx
        head.__class__ = LossHead

    @property
    def num_layers(self) -> int:
        return len(self._decoder.layers)

    @property
    def head_shape(self) -> tuple[int, int]:
        """Vocabulary V and width D of the head."""
        return self._head.out_features, self._head.in_features

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self._decoder.layers)

    def hidden_by_exit(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        exit_layers: Iterable[int],
        *,
        kept: Sequence[Tensor] | None = None,
        scales: Sequence[float] = (),
        entered: Iterable[int] = (),
        positions: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Hidden states [B, T, D] after the final norm at each exit layer in 1..num_layers.

        Args:
            input_ids: [B, T].
            position_ids: [B, T], restarting at 0 with each document; attention does not cross a restart.
            exit_layers: Exits wanted.
            kept: For each block the samples [K] that go through it, on the model's device; None keeps all.
            scales: For each block the factor on its kept residual; needed with `kept`.
            entered: Blocks that run even if no sample is kept, since ranks that share their weights keep some.
            positions: Indices [N] of those among the B * T positions that are wanted; the result is then [N, D].
        """
        wanted = set(exit_layers)
        plan = self._plan
        plan.kept, plan.scales, plan.entered = kept, scales, frozenset(entered)
        states = self.states(input_ids, position_ids, wanted)
        normed = states.pop(self.num_layers)  # never norm twice
        hidden = {layer: self.norm(_pick(state, positions)) for layer, state in states.items()}
        if self.num_layers in wanted:
            hidden[self.num_layers] = _pick(normed, positions)
        return hidden

    def states(self, input_ids: Tensor, position_ids: Tensor, exit_layers: Iterable[int]) -> dict[int, Tensor]:
        """The states [B, T, D] before any norm that leave the last block of each exit, and the final normed state.

        The latter is that of exit `num_layers`, wanted or not. Arguments are those of `hidden_by_exit`.
        """
        plan = self._plan
        plan.exit_layers = frozenset(exit_layers) - {self.num_layers}
        try:
            # Only without cache and mask does transformers see the documents in position_ids.
            out = self._decoder(input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False)
            return {**plan.taps, self.num_layers: out.last_hidden_state}
        finally:
            plan.exit_layers, plan.taps = frozenset(), {}
            # `kept` stays, since activation checkpointing reads it again in the backward.

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm alone: states [..., D] that leave a block -> normed states [..., D]."""
        normed: Tensor = self._decoder.norm(hidden)
        return normed

    def token_losses(self, normed: Tensor, labels: Tensor) -> Tensor:
        """Cross entropies [...] in nats of normed hidden states [..., D]; 0 where the label is -100, no gradient."""
        losses: Tensor = self._head(normed, labels)
        return losses

    def weighted_losses(
        self,
        normed: Sequence[Tensor],
        labels: Tensor,
        weights: Sequence[float],
        teacher: Teacher | None = None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of `weights` times the token losses of each exit's normed states, with gradient; the losses [E, ...].

        The losses are cross entropies of the labels unless `teacher` says otherwise, and those given that the token is
        one of `token_ids`, if there are any.
        """
        total, losses = self._head(normed, labels, weights, teacher, token_ids)
        return total, losses

    def head(self, normed: Tensor) -> Tensor:
        """Normed hidden states [..., D] -> logits [..., V]."""
        logits: Tensor = self._head(normed)
        return logits


def _pick(hidden_BTD: Tensor, positions_N: Tensor | None) -> Tensor:
    return hidden_BTD if positions_N is None else hidden_BTD.flatten(0, 1).index_select(0, positions_N)
