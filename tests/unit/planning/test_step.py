"""What a plan says of a step, against the real module's real step."""

from dataclasses import fields
from resource import RUSAGE_SELF, getrusage
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MixtralConfig, Qwen3Config

from app.errors import ConfigError
from app.model.cpu import attention
from app.planning.step import FLOP_FORMULAS, Micro, MicroBatchCosts, build_fake, measure_micro_batch
from app.training.module import LayerSkipModule
from tests.support.tiny_models import tiny_config

ROWS, LENGTH, LAYERS = 4, 96, 4
PRECISIONS = [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)]


@pytest.fixture(autouse=True)
def as_on_other_devices(monkeypatch):
    """Plans are of torch's own attention, which keeps no scores."""
    monkeypatch.setattr(attention, "_MAX_LENGTH", 0)


def config_of(kind="llama", **settings):
    settings = {"hidden_size": 64, "vocab_size": 300, "num_layers": LAYERS, "tied": False} | settings
    tiny = tiny_config(**settings)
    if kind == "llama":
        return tiny
    classes = {"mistral": MistralConfig, "qwen3": Qwen3Config}
    extra = {"sliding_window": 16, "head_dim": 16}
    if kind == "qwen3":
        extra |= {"use_sliding_window": True, "max_window_layers": 2}
    return classes[kind](**(tiny.to_diff_dict() | extra | {"architectures": None, "model_type": kind}))


def predicted(config, *, num_exits, dtype=torch.float32, autocast=None, rows=ROWS, length=LENGTH):
    micro = Micro(batch_size=rows, seq_len=length, num_exits=num_exits, dtype=dtype, autocast=autocast)
    return measure_micro_batch(*build_fake(config, dtype=dtype), micro)


class RealStep:
    """A step of a module on rows of two documents each; a subclass says what of it."""

    def __init__(self, module, *, vocab_size, autocast=None):
        self.module = module
        self.module.configure_model()
        tokens = torch.randint(vocab_size, (2, ROWS, LENGTH))
        positions = torch.arange(LENGTH // 2).repeat(2).expand(ROWS, LENGTH).contiguous()
        self.batch = {"input_ids": tokens[0], "labels": tokens[1], "position_ids": positions}
        self.autocast = torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None)

    def forward(self):
        with self.autocast:
            return self.loss()

    def flops(self, **settings):
        with FlopCounterMode(display=False, **settings) as counter:
            self.forward().backward()
        return counter.get_total_flops()


class TrainingStep(RealStep):
    """The module's own training step."""

    def __init__(self, config, exits, *, dtype=torch.float32, autocast=None, max_dropout_rate=0.0):
        super().__init__(LayerSkipModule(config=config), vocab_size=config.vocab_size, autocast=autocast)
        self.module.model.to(dtype)
        self.module.trainer = SimpleNamespace(
            accumulate_grad_batches=1,
            global_step=3,
            global_rank=0,
            distributed_sampler_kwargs=None,
            callbacks=[],
            world_size=1,
        )
        self.module.set_exit_weights(dict.fromkeys(exits, 1 / len(exits)))
        rates = [max_dropout_rate * idx / (LAYERS - 1) for idx in range(LAYERS)]
        self.module.set_dropout_rates(rates)

    def loss(self):
        return self.module.training_step(self.batch, 0)

    def kept_shares(self):
        return [1 - share for share in self.module.dropped_shares]


@pytest.mark.parametrize(
    ("kind", "exits"),
    [("llama", (LAYERS,)), ("llama", (1, 3, LAYERS)), ("mistral", (1, 3, LAYERS)), ("qwen3", (LAYERS,))],
)
def test_flops_are_those_of_a_real_step(kind, exits):
    config = config_of(kind)
    costs = predicted(config, num_exits=len(exits))
    real = TrainingStep(config, exits).flops(custom_mapping=FLOP_FORMULAS)
    assert costs.flops(num_exits=len(exits), kept_shares=[1.0] * LAYERS) == pytest.approx(real, rel=0.001)
    if len(exits) > 1:
        assert costs.flops(num_exits=len(exits) - 1, kept_shares=[1.0] * LAYERS) < 0.95 * real


def test_flops_are_what_torchs_counter_says_by_itself():
    """Of attention as separate products, and under autocast, so that it knows every operation."""
    config = config_of()
    costs = predicted(config, num_exits=2, autocast=torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        real = TrainingStep(config, (2, LAYERS), autocast=torch.bfloat16).flops()
    assert costs.flops(num_exits=2, kept_shares=[1.0] * LAYERS) == pytest.approx(real, rel=0.05)


def test_dropped_samples_save_their_share_of_a_blocks_flops():
    config = config_of()
    step = TrainingStep(config, (2, LAYERS), max_dropout_rate=0.9)
    real = step.flops(custom_mapping=FLOP_FORMULAS)
    assert len(set(step.kept_shares())) > 1
    costs = predicted(config, num_exits=2)
    assert costs.flops(num_exits=2, kept_shares=step.kept_shares()) == pytest.approx(real, rel=0.001)
    assert costs.flops(num_exits=2, kept_shares=[1.0] * LAYERS) > 1.1 * real


def live_and_peak(step):
    """Bytes that the allocator handed out and did not get back: before the backward, and at most in the whole step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as before:
        loss = step.forward()
    live = sum(event.nbytes() for event in before.profiler.kineto_results.events() if event.name() == "[memory]")
    del loss
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as whole:
        step.forward().backward()
    now = peak = 0
    changes = [event for event in whole.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return live, peak


def saved_for_backward(step):
    """Bytes of distinct storages that the graph keeps, parameters apart."""
    known = {parameter.untyped_storage().data_ptr() for parameter in step.module.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.forward()
    del loss
    return sum(num_bytes for num_bytes, _ in found.values())


@pytest.mark.parametrize(
    ("kind", "dtype", "autocast"), [*(("llama", *each) for each in PRECISIONS), ("qwen3", *PRECISIONS[1])]
)
def test_memory_is_what_a_real_step_takes(kind, dtype, autocast):
    """By the allocator and by what autograd keeps; the issue allows 20 %."""
    config = config_of(kind)
    costs = predicted(config, num_exits=2, dtype=dtype, autocast=autocast)
    step = TrainingStep(config, (2, LAYERS), dtype=dtype, autocast=autocast)
    forward = costs.activation_bytes + sum(costs.copy_bytes)
    live, peak = live_and_peak(step)
    assert forward == pytest.approx(saved_for_backward(step), rel=0.03)
    assert forward == pytest.approx(live, rel=0.03)
    assert forward + costs.exit_loss_bytes == pytest.approx(peak, rel=0.03)
    assert (sum(costs.copy_bytes) > 0.04 * live) == (autocast is not None)


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "autocast"),  # the peak is in a block's backward, or in the loss
    [(32, *PRECISIONS[1]), (32, *PRECISIONS[2]), (300, *PRECISIONS[0]), (300, *PRECISIONS[1])],
)
def test_memory_with_checkpointed_blocks_is_what_a_real_step_takes_then(dtype, autocast, vocab_size):
    config = config_of(vocab_size=vocab_size)
    costs = predicted(config, num_exits=2, dtype=dtype, autocast=autocast)
    step = TrainingStep(config, (2, LAYERS), dtype=dtype, autocast=autocast)
    step.module.model.activation_checkpointing_enable()
    _, peak = live_and_peak(step)
    running = max(costs.recomputed_bytes, costs.exit_loss_bytes + sum(costs.copy_bytes))
    assert costs.checkpointed_bytes + running == pytest.approx(peak, rel=0.15)
    assert costs.activation_bytes + costs.exit_loss_bytes > 1.5 * peak


def test_a_block_that_is_computed_again_brings_the_copies_of_its_weights():
    counts = dict.fromkeys([field.name for field in fields(MicroBatchCosts)], 0)
    costs = MicroBatchCosts(**(counts | {"block_bytes": (30, 50), "copy_bytes": (40, 1)}))
    assert costs.recomputed_bytes == 70


def test_an_architecture_that_cannot_run_without_values_is_refused():
    mixture = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="model: got 'mixtral', allowed an architecture whose training step can be"):
        predicted(mixture, num_exits=1)


def test_a_large_model_takes_no_memory_and_few_operations():
    """4 billion parameters; `ru_maxrss` is the highest of the process."""
    config = tiny_config(
        num_layers=2, hidden_size=8192, vocab_size=128256, tied=False, intermediate_size=28672,
        num_attention_heads=64, num_key_value_heads=8, max_length=8192,
    )  # fmt: skip
    before = getrusage(RUSAGE_SELF).ru_maxrss
    costs = predicted(config, num_exits=2, dtype=torch.bfloat16, rows=1, length=128)
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB on Linux, bytes elsewhere
    matrices = 855_638_016  # parameters in those of a block
    assert sum(costs.block_flops) == pytest.approx(6 * 128 * 2 * matrices, rel=0.01)
    assert costs.exit_flops == 6 * 128 * 8192 * 128256
