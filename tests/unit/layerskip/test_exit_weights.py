import pytest

from app.layerskip.exit_weights import EXIT_WEIGHTS, exit_weight, normalised_exit_weights


def test_quadratic_weights_equal_the_hand_table():
    weights = [exit_weight(idx, num_layers=6, early_exit_scale=0.2) for idx in range(6)]
    assert weights == pytest.approx([0.0, 0.2, 0.6, 1.2, 2.0, 5 + 0.2 * 4 * 5 / 2])


def test_linear_and_uniform_tables():
    linear = [exit_weight(i, num_layers=4, early_exit_scale=0.5, kind="linear") for i in range(4)]
    uniform = [exit_weight(i, num_layers=4, early_exit_scale=0.5, kind="uniform") for i in range(4)]
    assert linear == [0, 0.5, 1.0, 3]
    assert uniform == [0.5, 0.5, 0.5, 1]


@pytest.mark.parametrize("kind", EXIT_WEIGHTS)
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_normalised_weights_sum_to_one_and_scale_zero_leaves_the_full_model(kind, num_layers):
    every = range(1, num_layers + 1)
    weights = normalised_exit_weights(every, num_layers=num_layers, early_exit_scale=0.3, kind=kind)
    assert sum(weights.values()) == pytest.approx(1.0)
    assert normalised_exit_weights(every, num_layers=num_layers, early_exit_scale=0.0, kind=kind) == {num_layers: 1.0}


def test_ratio_of_two_weights_does_not_depend_on_which_other_exits_are_on():
    few = normalised_exit_weights([3, 6], num_layers=6, early_exit_scale=0.2)
    many = normalised_exit_weights([2, 3, 4, 5, 6], num_layers=6, early_exit_scale=0.2)
    assert few[3] / few[6] == pytest.approx(many[3] / many[6])
    assert few[3] == pytest.approx(0.6 / (0.6 + 7.0))


def test_exit_of_weight_zero_is_left_out():
    assert set(normalised_exit_weights([1, 4], num_layers=4, early_exit_scale=0.2)) == {4}


def test_no_exit_of_positive_weight_is_an_error():
    with pytest.raises(ValueError, match="no exit of positive weight"):
        normalised_exit_weights([1], num_layers=4, early_exit_scale=0.2)
