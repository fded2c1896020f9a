"""What a plan says of a step of exit blocks, against the real module's real step."""

import pytest
import torch

from app.model import head_loss
from app.planning import exit_blocks
from app.planning.exit_blocks import Distillation, fake_exit_blocks, measure_distillation, plan_exit_blocks
from app.planning.memory import Layout
from app.planning.plan import Machine
from app.planning.recipe import Recipe
from app.planning.step import FLOP_FORMULAS, Micro
from app.training.exit_block_settings import ExitBlockSettings
from app.training.module import LayerSkipModule
from app.training.optim import parameter_groups
from tests.support.tiny_models import tiny_llama
from tests.unit.planning.test_step import LENGTH, ROWS, RealStep, live_and_peak

EXITS = {1: 2, 2: 0}
WIDTH, VOCABULARY = 64, 1500


class ExitBlockStep(RealStep):
    """The module's own loss of exit blocks."""

    def __init__(self, folder, *, loss, cached, autocast):
        tiny_llama(num_layers=4, hidden_size=WIDTH, vocab_size=VOCABULARY).save_pretrained(folder)
        module = LayerSkipModule(pretrained=str(folder), exit_blocks=ExitBlockSettings(EXITS, loss=loss))
        super().__init__(module, vocab_size=VOCABULARY, autocast=autocast)
        self.module.model.eval()
        self.cached = cached

    def loss(self):
        states = {}
        if self.cached is not None:  # made here, since they are part of what a step holds
            states = {"states": torch.zeros(ROWS, LENGTH, len(EXITS) + 1, WIDTH, dtype=self.cached)}
        return self.module.exit_block_loss(self.batch | states).weighted_sum


def measured(learns, **settings):
    config = tiny_llama(num_layers=4, hidden_size=WIDTH, vocab_size=VOCABULARY).config
    micro = Micro(batch_size=ROWS, seq_len=LENGTH, num_exits=len(learns.sources), **settings)
    return measure_distillation(*fake_exit_blocks(config, learns, dtype=torch.float32), micro, learns)


@pytest.mark.parametrize(
    ("loss", "cached", "autocast"),
    [
        ("lk", torch.bfloat16, None),
        ("lk", None, None),
        ("kl", torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_step_takes_what_is_planned(tmp_path, monkeypatch, loss, cached, autocast):
    """By torch's counter and the allocator; the issue of plans allows 20 %."""
    monkeypatch.setattr(head_loss, "_MIN_LOGITS", 1)  # several chunks
    step = ExitBlockStep(tmp_path, loss=loss, cached=cached, autocast=autocast)
    learns = Distillation(sources=step.module.exit_sources, loss=loss, cached=cached)
    costs = measured(learns, autocast=autocast)
    pass_flops = costs.pass_flops if cached is None else 0
    assert costs.base_flops + pass_flops == pytest.approx(step.flops(custom_mapping=FLOP_FORMULAS), rel=0.001)
    _, peak = live_and_peak(step)
    assert costs.base_bytes + costs.exit_loss_bytes == pytest.approx(peak, rel=0.05)
    assert costs.base_bytes < 0.9 * peak
    monkeypatch.setattr(exit_blocks, "_MOST_LOGITS", VOCABULARY * ROWS * LENGTH // 2)
    half = measured(learns, autocast=autocast)  # of the tokens went through the loss
    assert half.base_flops == costs.base_flops
    assert half.base_bytes + half.exit_loss_bytes == pytest.approx(costs.base_bytes + costs.exit_loss_bytes, rel=0.02)


def test_frozen_weights_have_neither_gradients_nor_states_and_few_ids_make_a_small_head():
    config = tiny_llama(num_layers=4, hidden_size=WIDTH, vocab_size=VOCABULARY).config
    recipe = Recipe(num_layers=4, from_scratch=False, batch_size=2, seq_len=16, accumulate=3, max_steps=10)

    def planned(num_ids=None, cached=torch.bfloat16, layout=Layout(), machine=Machine()):  # noqa: B008
        learns = Distillation(sources={1: [3]}, num_ids=num_ids, cached=cached)
        optimizer = lambda module: torch.optim.AdamW(parameter_groups(module), lr=1e-3)  # noqa: E731
        settings = {"layout": layout, "dtype": torch.float32, "autocast": None, "machine": machine}
        return plan_exit_blocks(config, recipe, optimizer, learns=learns, **settings)

    whole, model = planned(machine=Machine(peak_flops=1e9)), tiny_llama(num_layers=4, hidden_size=WIDTH)
    own = sum(p.numel() for p in model.model.layers[3].parameters()) + WIDTH
    assert whole.exit_blocks.parameters == whole.parameters.trained == own
    assert whole.memory.weights == 4 * whole.parameters.total
    assert (whole.memory.gradients, whole.memory.optimizer_states) == (4 * own, 8 * own)
    assert planned(layout=Layout(strategy="ddp")).memory.communication == 4 * own
    assert whole.hours == pytest.approx(10 * whole.step_flops / 0.4e9 / 3600)
    on_line = planned(cached=None)
    passed = on_line.step_flops - whole.step_flops
    assert (on_line.exit_blocks.pass_flops, whole.exit_blocks.pass_flops) == (passed, 0)
    assert passed == whole.exit_blocks.pass_flops_per_token * 3 * 2 * 16
    products = 3 * 3 * 2 * 16 * WIDTH  # both models' logits and a gradient, of the tokens of three micro-batches
    assert whole.step_flops - planned(num_ids=500).step_flops == 2 * products * (VOCABULARY - 500)
