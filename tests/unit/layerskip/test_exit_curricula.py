import pytest

from app.layerskip.exit_curricula import EXIT_CURRICULA, exits_on, gradual_exits, rotational_exits


def test_rotational_exits_follow_the_formula():
    for step in range(20):
        expected = {l + 1 for l in range(8) if (l - step) % 3 == 0} | {8}  # noqa: E741
        assert set(rotational_exits(step, num_layers=8, interval=3)) == expected


def test_each_exit_is_on_once_in_a_rotation_and_about_l_over_r_at_a_step():
    steps = [rotational_exits(step, num_layers=10, interval=4, always_on_last=False) for step in range(4)]
    assert sorted(exit_layer for exits in steps for exit_layer in exits) == list(range(1, 11))
    assert {len(exits) for exits in steps} == {2, 3}


def test_interval_of_the_paper_gives_one_early_exit_beside_the_last():
    for step in range(31):
        assert len(rotational_exits(step, num_layers=32, interval=31)) in (1, 2)
    assert rotational_exits(5, num_layers=32, interval=31) == (6, 32)


def test_last_layer_is_always_on_unless_told_otherwise():
    assert all(8 in rotational_exits(step, num_layers=8, interval=4) for step in range(8))
    assert not all(8 in rotational_exits(step, num_layers=8, interval=4, always_on_last=False) for step in range(8))


def test_gradual_starts_with_the_last_and_adds_one_every_t_over_2l_steps():
    assert gradual_exits(0, num_layers=4, total_steps=80) == (4,)
    assert gradual_exits(9, num_layers=4, total_steps=80) == (4,)
    assert gradual_exits(10, num_layers=4, total_steps=80) == (3, 4)
    assert gradual_exits(29, num_layers=4, total_steps=80) == (2, 3, 4)
    assert gradual_exits(30, num_layers=4, total_steps=80) == (1, 2, 3, 4)


def test_gradual_has_every_exit_on_at_half_of_the_run_and_never_takes_one_back():
    previous: set[int] = set()
    for step in range(101):
        now = set(gradual_exits(step, num_layers=7, total_steps=101))
        assert now >= previous
        previous = now
    assert len(gradual_exits(51, num_layers=7, total_steps=101)) == 7


@pytest.mark.parametrize("curriculum", EXIT_CURRICULA)
def test_every_curriculum_of_the_table_keeps_the_full_model_on(curriculum):
    for step in range(12):
        exits = exits_on(
            step, curriculum=curriculum, num_layers=6, rotation_interval=5, always_on_last=True, total_steps=12
        )
        assert exits[-1] == 6
        assert list(exits) == sorted(set(exits))


def test_none_is_the_full_model_alone():
    assert exits_on(3, curriculum="none", num_layers=6, rotation_interval=2, always_on_last=True, total_steps=None) == (
        6,
    )


def test_gradual_without_a_known_length_is_an_error():
    with pytest.raises(ValueError, match="gradual"):
        exits_on(0, curriculum="gradual", num_layers=6, rotation_interval=2, always_on_last=True, total_steps=None)


def test_fixed_is_the_given_exits_and_the_last_at_every_step():
    for step in range(5):
        exits = exits_on(
            step,
            curriculum="fixed",
            num_layers=6,
            rotation_interval=2,
            always_on_last=True,
            total_steps=None,
            exit_layers=(4, 2),
        )
        assert exits == (2, 4, 6)
