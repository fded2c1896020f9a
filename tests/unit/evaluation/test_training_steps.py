import pytest
import torch

from app.evaluation.peak_memory import peak_memory
from app.evaluation.training_steps import StepSettings, exit_loss, one_step, our_steps, recipe_steps, time_steps
from tests.support.tiny_models import tiny_config


def settings(**changed):
    config = tiny_config(num_layers=4, vocab_size=50, max_length=16)
    return StepSettings(
        **({"config": config, "batch_size": 2, "seq_len": 8, "dtype": torch.float32, "exit_layers": (2, 4)} | changed)
    )


def test_our_plain_step_computes_what_transformers_own_computes():
    ours, theirs = our_steps(settings()), recipe_steps(settings())
    assert ours["plain"]() == pytest.approx(theirs["transformers, plain"](), abs=1e-6)


def test_the_recipes_compute_the_loss_of_ours_when_nothing_is_dropped():
    same = settings(max_dropout_rate=0.0)
    expected = our_steps(same)["LayerSkip"]()
    assert expected != our_steps(same)["plain"]()
    for name in ("recipe, logits stacked", "recipe, exit by exit"):
        assert recipe_steps(same)[name]() == pytest.approx(expected, abs=1e-6)


def test_a_step_drops_what_its_name_says():
    steps = our_steps(settings(max_dropout_rate=0.9))
    assert len({steps["LayerSkip"]() for _ in range(8)}) > 1  # other rows each time
    losses = [steps[name]() for name in ("plain", "plain, half the blocks' work", "plain, no block")]
    assert len(set(losses)) == 3


def test_steps_take_turns_and_the_first_round_does_not_count():
    turns = []
    steps = {name: lambda name=name: turns.append(name) or 0.0 for name in "ab"}
    seconds = time_steps(steps, repeats=2)
    assert turns == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_step_alone_is_the_one_of_that_name():
    assert one_step("plain", settings())() == our_steps(settings())["plain"]()
    assert one_step("transformers, plain", settings())() == recipe_steps(settings())["transformers, plain"]()


def buffer(mebibytes):
    return lambda: torch.ones(mebibytes, 2**18).sum().item()


def test_peak_memory_counts_what_the_work_adds_and_frees_again():
    assert 64 <= peak_memory(buffer, 64, num_threads=1) / 2**20 < 72


def test_the_exits_loss_is_the_mean_of_equal_exits():
    assert exit_loss(3, 10, 7, 4)() > 0
