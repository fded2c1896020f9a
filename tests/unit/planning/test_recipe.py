"""What a recipe drops and unembeds on average, and the rules it breaks."""

from dataclasses import replace
from statistics import mean

import pytest

from app.layerskip.exit_curricula import gradual_exits
from app.layerskip.schedules import dropout_rates
from app.planning.recipe import Recipe, find_departures

# The paper's Llama 2 7B: continual pretraining on 52 billion tokens, and from scratch on 26 billion.
CONTINUAL = Recipe(
    num_layers=32, from_scratch=False, batch_size=4, seq_len=4096, world_size=64, max_steps=50_000, learning_rate=3e-5,
    max_dropout_rate=0.1, curriculum="rotational", rotation_interval=8, early_exit_scale=0.2,
)  # fmt: skip
SCRATCH = replace(
    CONTINUAL, from_scratch=True, world_size=32, learning_rate=8e-4, max_dropout_rate=0.2, time_scale="exponential",
    rotation_interval=31,
)  # fmt: skip


def fields(recipe):
    return [departure.field for departure in find_departures(recipe)]


def test_tokens_are_those_of_the_paper():
    assert CONTINUAL.tokens == pytest.approx(52e9, rel=0.01)
    assert SCRATCH.tokens == pytest.approx(26e9, rel=0.01)
    assert replace(CONTINUAL, max_steps=None).tokens is None


def test_mean_rates_are_the_mean_over_all_steps():
    recipe = replace(SCRATCH, max_steps=37)
    steps = [
        dropout_rates(step, num_layers=32, max_dropout_rate=0.2, time="exponential", total_steps=37)
        for step in range(37)
    ]
    assert recipe.mean_dropout_rates == pytest.approx([mean(rates) for rates in zip(*steps, strict=True)])
    assert mean(CONTINUAL.mean_dropout_rates) == pytest.approx(0.044, abs=5e-4)  # method card: 4.4 %
    assert mean(SCRATCH.mean_dropout_rates) < 0.5 * mean(SCRATCH.last_dropout_rates)


def test_exits_are_counted_as_they_are_unembedded():
    assert CONTINUAL.exits_by_step == (4, 5, 5, 5, 5, 5, 5, 4)  # exit 1 has weight 0; the full model is on anyway
    assert SCRATCH.mean_exits == pytest.approx(61 / 31)
    assert replace(CONTINUAL, early_exit_scale=0.0).mean_exits == 1
    assert replace(CONTINUAL, curriculum="none").mean_exits == 1
    assert replace(CONTINUAL, curriculum="fixed", exit_layers=(8, 12)).exits_by_step == (3,)


def test_the_gradual_curriculum_is_averaged_over_the_run():
    recipe = replace(CONTINUAL, curriculum="gradual", max_steps=5_800, early_exit_scale=1.0)
    exact = mean(len(set(gradual_exits(step, num_layers=32, total_steps=5_800)) - {1}) for step in range(5_800))
    assert recipe.mean_exits == pytest.approx(exact, rel=0.005)
    assert max(recipe.exits_by_step) == 31


def test_the_papers_recipes_break_no_rule():
    assert fields(CONTINUAL) == fields(SCRATCH) == []


@pytest.mark.parametrize(
    ("recipe", "changes", "field"),
    [
        (SCRATCH, {"time_scale": "constant"}, "layer_dropout.time_scale"),
        (CONTINUAL, {"time_scale": "exponential"}, "layer_dropout.time_scale"),
        (SCRATCH, {"learning_rate": 3e-4}, "model.optimizer.lr"),
        (CONTINUAL, {"max_steps": 5_000}, "early_exit.early_exit_scale"),
        (CONTINUAL, {"early_exit_scale": 1.0}, "early_exit.early_exit_scale"),
        (CONTINUAL, {"max_steps": 10, "early_exit_scale": 1.0}, "early_exit.exit_weights"),
        (CONTINUAL, {"batch_size": 1, "world_size": 256}, "data.batch_size"),
        (CONTINUAL, {"small_weights": True}, "trainer.precision"),
        (CONTINUAL, {"loss": "kl"}, "early_exit.loss"),
    ],
)
def test_a_broken_rule_is_named_with_its_source(recipe, changes, field):
    (departure,) = find_departures(replace(recipe, **changes))
    assert departure.field == field
    assert "arXiv" in departure.source or "method card" in departure.source


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (SCRATCH, {"max_dropout_rate": 0.0, "learning_rate": 3e-4, "time_scale": "constant"}),
        (CONTINUAL, {"max_steps": 5_000, "early_exit_scale": 1.0}),
        (CONTINUAL, {"max_steps": 10, "early_exit_scale": 1.0, "exit_weights": "uniform"}),
        (CONTINUAL, {"batch_size": 1, "world_size": 256, "max_dropout_rate": 0.0}),
        (CONTINUAL, {"batch_size": 8}),
        (CONTINUAL, {"max_steps": None}),
    ],
)
def test_a_rule_that_does_not_apply_is_not_named(recipe, changes):
    assert fields(replace(recipe, **changes)) == []


def test_the_chance_that_a_whole_block_is_dropped_is_told():
    (departure,) = find_departures(replace(CONTINUAL, batch_size=1, world_size=256))
    assert "in 10% of micro-batches" in departure.message
