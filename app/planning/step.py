"""What a training step computes and keeps, found by running it on tensors that have shapes but no memory.

There is no formula per architecture. The real blocks, head and loss run on fake tensors, and every operation of the
forward and the backward is counted. Blocks of one kind cost the same, so one of each kind runs and the rest is dropped.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel

from app.errors import ConfigError
from app.layerskip.early_exit_loss import early_exit_loss
from app.model.early_exit import EarlyExitModel
from app.model.lora import LoraSettings, add_adapters
from app.model_files.open import build_model

_MANY_LABELS = 2**16  # labels in all exits, from which on the loss works in chunks that do not grow


def _product(*shapes: Sequence[int], **_: object) -> int:
    _total, (rows, inner), (_inner, columns) = shapes
    return 2 * rows * inner * columns


def _attention(*shapes: Any, **_: object) -> int:
    return int(sdpa_flop_count(*shapes[:3]))  # type: ignore[no-untyped-call]


def _attention_backward(*shapes: Any, **_: object) -> int:
    return int(sdpa_backward_flop_count(*shapes[:4]))  # type: ignore[no-untyped-call]


# Operations of a step that torch's counter does not know, counted as it counts similar ones.
FLOP_FORMULAS = {
    torch.ops.aten.addmm_: _product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(frozen=True, kw_only=True)
class Micro:
    """The shape of a micro-batch on one device, and the dtypes it is computed in."""

    batch_size: int
    seq_len: int  # tokens a row, each with a label
    num_exits: int  # exits in the loss, the full model among them
    dtype: torch.dtype = torch.float32  # dtype of the weights
    autocast: torch.dtype | None = None  # dtype of the products, where it is another


@dataclass(frozen=True, kw_only=True)
class MicroBatchCosts:
    """FLOPs of forward and backward, and bytes, of one micro-batch that drops no block."""

    block_flops: tuple[int, ...] = (0,)  # FLOPs of each block
    base_flops: int  # FLOPs of everything else with the full model's exit alone
    exit_flops: int = 0  # FLOPs of each further exit
    block_bytes: tuple[int, ...] = (0,)  # what each block keeps for the backward, without `copy_bytes`
    # Each block's weights in the dtype of autocast, which the backward keeps as well.
    copy_bytes: tuple[int, ...] = (0,)
    base_bytes: int  # what is kept outside the blocks when the loss begins
    exit_loss_bytes: int  # what the loss adds to that at its peak
    block_input_bytes: int = 0  # what remains of a block under activation checkpointing

    def flops(self, *, num_exits: float, kept_shares: Sequence[float]) -> float:
        """Count the FLOPs with `num_exits` exits, where block l runs on `kept_shares[l]` of the rows."""
        blocks = sum(share * flops for share, flops in zip(kept_shares, self.block_flops, strict=True))
        return blocks + self.base_flops + (num_exits - 1) * self.exit_flops

    @property
    def activation_bytes(self) -> int:
        """The bytes that are alive when the loss begins, beside the weights and their copies."""
        return sum(self.block_bytes) + self.base_bytes

    @property
    def checkpointed_bytes(self) -> int:
        """`activation_bytes` where each block keeps its input alone, and is computed again in the backward."""
        return len(self.block_bytes) * self.block_input_bytes + self.base_bytes

    @property
    def recomputed_bytes(self) -> int:
        return max(kept + copy for kept, copy in zip(self.block_bytes, self.copy_bytes, strict=True))


def build_fake(
    config: PreTrainedConfig, *, dtype: torch.dtype, lora: LoraSettings | None = None
) -> tuple[PreTrainedModel, FakeTensorMode]:
    """The model that `config` describes, made of fake tensors, and their mode; `lora` freezes it and adds adapters."""
    mode = FakeTensorMode()
    with mode:
        model = build_model(config, seed=0)
    if lora is not None:
        add_adapters(model, lora, seed=0, without_memory=True)  # whose modules the mode does not let peft convert
    with mode:
        for module in model.modules():
            for name, parameter in [*module.named_parameters(recurse=False)]:
                if parameter.device.type == "meta":
                    setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model.train(), mode


def measure_micro_batch(model: PreTrainedModel, mode: FakeTensorMode, micro: Micro) -> MicroBatchCosts:
    """Run the step of `LayerSkipModule` on the fake tensors of `build_fake`; the classes of the blocks are swapped.

    Rows are taken to hold several documents each, so that attention has a mask, and no block to be dropped. ConfigError
    if the architecture cannot be run so, for instance because shapes depend on values.
    """
    network, blocks = EarlyExitModel(model), model.get_decoder().layers
    kinds = [_kind(model, block, idx) for idx, block in enumerate(blocks)]
    num_labels = micro.batch_size * micro.seq_len
    run_exits = micro.num_exits if micro.num_exits * num_labels <= _MANY_LABELS else min(2, micro.num_exits)
    with refused_where_values_decide(model), mode:
        base = _run(model, network, micro, num_labels=num_labels)
        exits = _run(model, network, micro, num_labels=num_labels, num_exits=run_exits)
        empty = _run(model, network, micro)
        runs = {
            kind: _run(model, network, micro, run_block=idx)
            for idx, kind in enumerate(kinds)
            if kind not in kinds[:idx]
        }
    itemsize = 0 if micro.autocast in (None, micro.dtype) else torch.finfo(micro.autocast).bits // 8
    copies = [itemsize * sum(p.numel() for p in block.parameters() if p.dim() > 1) for block in blocks]
    saved = [runs[kind].bytes - empty.bytes - copy for kind, copy in zip(kinds, copies, strict=True)]
    more = (micro.num_exits - 1) / max(1, run_exits - 1)  # exits beyond those that ran cost as the last ones did
    width = model.config.get_text_config().hidden_size
    return MicroBatchCosts(
        block_flops=tuple(runs[kind].flops - empty.flops for kind in kinds),
        base_flops=base.flops,
        exit_flops=(exits.flops - base.flops) // max(1, run_exits - 1),
        block_bytes=tuple(saved),
        copy_bytes=tuple(copies),
        base_bytes=base.bytes + int(more * (exits.bytes - base.bytes)),
        exit_loss_bytes=base.loss_bytes + int(more * (exits.loss_bytes - base.loss_bytes)),
        block_input_bytes=micro.batch_size * micro.seq_len * width * micro.dtype.itemsize,
    )


@contextmanager
def refused_where_values_decide(model: PreTrainedModel) -> Iterator[None]:
    """Raise ConfigError for an architecture whose step cannot be run on tensors without values."""
    try:
        yield
    except RuntimeError as error:  # torch's, in many forms, for shapes that depend on values and missing kernels
        allowed = "an architecture whose training step can be run without its values"
        raise ConfigError("model", got=model.config.model_type, allowed=allowed, fix=str(error)) from error


def _kind(model: PreTrainedModel, block: nn.Module, idx: int) -> tuple[Any, ...]:
    types = getattr(model.config.get_text_config(), "layer_types", None)
    return tuple(parameter.shape for parameter in block.parameters()), types and types[idx]


class _Run(NamedTuple):
    flops: int
    bytes: int  # alive when the loss begins
    loss_bytes: int  # more than that at the peak of the loss


def _run(
    model: PreTrainedModel,
    network: EarlyExitModel,
    micro: Micro,
    *,
    num_labels: int = 1,
    num_exits: int = 1,
    run_block: int | None = None,
) -> _Run:
    """Run one step in which at most one block is not dropped."""
    rows, length, num_layers = micro.batch_size, micro.seq_len, network.num_layers
    tokens_BT, position_ids_BT = torch.zeros(2, rows, length, dtype=torch.long)
    labels_N, positions_N = torch.zeros(2, num_labels, dtype=torch.long)
    kept = [torch.arange(rows if idx == run_block else 0) for idx in range(num_layers)]
    exits = range(num_layers - num_exits + 1, num_layers + 1)
    model.zero_grad()
    live = LiveBytes([*model.parameters(), *model.buffers(), tokens_BT, labels_N, *kept])
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with counter, live:
        with torch.autocast("cpu", dtype=micro.autocast or torch.bfloat16, enabled=micro.autocast is not None):
            hidden = network.hidden_by_exit(
                tokens_BT, position_ids_BT, exits, kept=kept, scales=[1.0] * num_layers, positions=positions_N
            )
            before = live.peak = live.now
            loss = early_exit_loss(hidden, labels_N, dict.fromkeys(exits, 1 / num_exits), network.weighted_losses)
            peak = live.peak
        loss.weighted_sum.backward()  # type: ignore[no-untyped-call]
    return _Run(counter.get_total_flops(), before, peak - before)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of what operations inside allocate, as long as that lives; `known` was there before."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, num_bytes: int) -> None:
        self.now -= num_bytes
