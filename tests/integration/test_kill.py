"""Kill -9 at any moment, again and again, `fit --ckpt_path last`, `auto` or a file: nobody could tell."""

import random
from itertools import product
from pathlib import Path

import pytest

from tests.support.killed_runs import STEPS, end, fit, printed, same, told, write_accumulating_config


def check_against(config, name):
    """Every micro-batch and validation of every process was the whole run's, and so is the end."""
    expected, seen = told(config, "whole"), told(config, name)
    assert set(expected.values()) == {1}
    assert seen.keys() == expected.keys(), printed(config, name)
    whole, resumed = end(config, "whole"), end(config, name)
    assert [key for key in whole if not same(whole[key], resumed[key])] == []
    assert whole["global_step"] == STEPS


def kill_and_go_on(config, name, kills):
    """Kill a run at each of `kills`, then let it end; how often it was killed before it did."""
    folder = config.parent / name / "checkpoints"
    statuses = []
    for number, kill_after in enumerate([*kills, None]):
        best = str(folder / "best.ckpt")
        hows = ["last", best, "auto"] if Path(best).exists() and (folder / "last.ckpt").exists() else ["auto"]
        statuses.append(fit(config, name, "--ckpt_path", hows[number % len(hows)], kill_after=kill_after))
    assert set(statuses) <= {0, -9}, printed(config, name)
    assert statuses[-1] == 0
    return statuses.count(-9)


def test_a_run_killed_twice_within_a_step_is_the_one_that_nobody_killed(tmp_path):
    settings = {"accumulate": 3, "curriculum": "gradual", "num_workers": 2, "saver": "Lightning's"}
    config = write_accumulating_config(tmp_path, **settings)
    assert fit(config, "whole") == 0
    # It goes on from the validation within step 9, saves within that step, and is killed before the next validation.
    assert kill_and_go_on(config, "killed", [(33, 0.0), (2, 0.0)]) == 2
    check_against(config, "killed")


CASES = list(product((2, 3, 4), ("rotational", "gradual"), (0, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "curriculum", "num_workers"), CASES)
def test_random_kills(tmp_path, accumulate, curriculum, num_workers):
    """Of twelve runs each two, killed five times together: sixty kills."""
    settings = {"accumulate": accumulate, "curriculum": curriculum, "num_workers": num_workers}
    draw = random.Random(str(settings))
    saver = "ours" if (curriculum == "gradual") == (num_workers == 0) else "Lightning's"
    config = write_accumulating_config(tmp_path, **settings, saver=saver)
    assert fit(config, "whole") == 0
    micro_batches = STEPS * accumulate
    killed = 0
    for name, kills in (("twice", 2), ("thrice", 3)):
        first = (draw.randint(1, micro_batches // 2), draw.uniform(0, 0.1))
        later = [(draw.randint(1, micro_batches // 6), draw.uniform(0, 0.1)) for _ in range(kills - 1)]
        killed += kill_and_go_on(config, name, [first, *later])
        check_against(config, name)
    assert killed == 5
