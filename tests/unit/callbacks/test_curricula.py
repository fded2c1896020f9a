"""The two curricula against ten-line hosts."""

from types import SimpleNamespace

import pytest

from app.errors import ConfigError
from app.layerskip.exit_curricula import EXIT_CURRICULA, gradual_exits, rotational_exits
from app.layerskip.exit_weights import EXIT_WEIGHTS, normalised_exit_weights
from app.layerskip.schedules import DEPTH_SCALES, TIME_SCALES, dropout_rates
from callbacks import EarlyExitCurriculum, LayerDropoutCurriculum


class Host:
    """Both protocols, and the module's log."""

    num_layers = 6

    def __init__(self):
        self.dropout_rates = (0.0,) * 6
        self.dropped_shares = (0.0,) * 6
        self.exit_weights = {6: 1.0}
        self.rescale = None
        self.logged = {}

    def set_dropout_rates(self, rates, *, rescale=False):
        self.dropout_rates, self.rescale = tuple(rates), rescale

    def set_exit_weights(self, weights, *, distil=False):
        self.exit_weights, self.distil = dict(weights), distil

    def log(self, name, value):
        self.logged[name] = value


def at(step, max_steps=20):
    return SimpleNamespace(global_step=step, max_steps=max_steps, world_size=1)


def start(callback, host, trainer):
    callback.setup(trainer, host, "fit")
    callback.on_train_batch_start(trainer, host, None, 0)
    callback.on_train_batch_end(trainer, host, None, None, 0)


def test_rates_reach_the_host_and_what_it_uses_is_logged():
    host = Host()
    start(LayerDropoutCurriculum(max_dropout_rate=0.4, time_scale="linear", rescale=True), host, at(7))
    expected = dropout_rates(7, num_layers=6, max_dropout_rate=0.4, time="linear", total_steps=20)
    assert host.dropout_rates == expected
    assert host.rescale is True
    assert host.logged["train/dropout_rate/last_layer"] == expected[-1]


def test_exits_reach_the_host_and_what_it_uses_is_logged():
    host = Host()
    start(EarlyExitCurriculum(curriculum="rotational", rotation_interval=3, early_exit_scale=0.5), host, at(4))
    exits = rotational_exits(4, num_layers=6, interval=3)
    assert host.exit_weights == normalised_exit_weights(exits, num_layers=6, early_exit_scale=0.5)
    assert host.logged["train/num_exits_on"] == len(host.exit_weights)
    assert host.logged["train/exit_weight/exit_06"] == host.exit_weights[6]
    assert host.distil is False
    start(EarlyExitCurriculum(curriculum="rotational", rotation_interval=3, loss="kl"), host, at(4))
    assert host.distil is True
    with pytest.raises(ConfigError, match="loss: got 'lk', allowed cross_entropy"):
        EarlyExitCurriculum(loss="lk")


@pytest.mark.parametrize("step", [5, 6, 9, 10])
def test_the_gradual_curriculum_is_done_at_half_of_the_trainers_steps(step):
    host = Host()
    start(EarlyExitCurriculum(curriculum="gradual", exit_weights="uniform"), host, at(step, max_steps=20))
    assert set(host.exit_weights) == set(gradual_exits(step, num_layers=6, total_steps=20))


@pytest.mark.parametrize(("curriculum", "rate"), [("none", 0.0), ("none", 0.2), ("rotational", 0.0), ("gradual", 0.2)])
def test_the_four_variants_are_reachable_by_settings_alone(curriculum, rate):
    host = Host()
    start(LayerDropoutCurriculum(max_dropout_rate=rate), host, at(19))
    start(EarlyExitCurriculum(curriculum=curriculum, rotation_interval=3), host, at(19))
    assert any(host.dropout_rates) == (rate > 0)
    assert (len(host.exit_weights) > 1) == (curriculum != "none")


def test_scale_zero_is_the_full_model_alone():
    host = Host()
    start(EarlyExitCurriculum(curriculum="rotational", rotation_interval=3, early_exit_scale=0.0), host, at(4))
    assert host.exit_weights == {6: 1.0}


@pytest.mark.parametrize("kind", DEPTH_SCALES)
@pytest.mark.parametrize("time", TIME_SCALES)
def test_every_dropout_table_entry_is_a_setting(kind, time):
    start(LayerDropoutCurriculum(max_dropout_rate=0.1, depth_scale=kind, time_scale=time), Host(), at(3))


@pytest.mark.parametrize("curriculum", EXIT_CURRICULA)
@pytest.mark.parametrize("kind", EXIT_WEIGHTS)
def test_every_exit_table_entry_is_a_setting(curriculum, kind):
    settings = {"exit_layers": [2]} if curriculum == "fixed" else {}
    start(EarlyExitCurriculum(curriculum=curriculum, rotation_interval=3, exit_weights=kind, **settings), Host(), at(3))


def test_fixed_exits_are_on_at_every_step_beside_the_last():
    host = Host()
    callback = EarlyExitCurriculum(
        curriculum="fixed", exit_layers=[4, 2], early_exit_scale=0.5, exit_weights="uniform", rotation_interval=8
    )
    for step in range(7):
        start(callback, host, at(step))
        assert host.exit_weights == {2: 0.25, 4: 0.25, 6: 0.5}


@pytest.mark.parametrize("exit_layers", [[0], [6], [3, 7]])
def test_fixed_exits_that_the_model_does_not_have_are_refused(exit_layers):
    with pytest.raises(ConfigError, match=r"exit_layers: got \[.*\], allowed 1\.\.5 for a 6-layer model"):
        start(EarlyExitCurriculum(curriculum="fixed", exit_layers=exit_layers), Host(), at(0))


@pytest.mark.parametrize(("curriculum", "exit_layers"), [("fixed", []), ("rotational", [2]), ("none", [2])])
def test_exit_layers_belong_to_the_fixed_curriculum_alone(curriculum, exit_layers):
    with pytest.raises(ConfigError, match=r"exit_layers: got .*, allowed some layers with curriculum fixed"):
        EarlyExitCurriculum(curriculum=curriculum, exit_layers=exit_layers)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_dropout_rate_out_of_range_is_refused(rate):
    with pytest.raises(ConfigError, match=r"max_dropout_rate: got .*, allowed \[0, 1\)"):
        LayerDropoutCurriculum(max_dropout_rate=rate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotation_interval": 0}, r"rotation_interval: got 0, allowed \[1"),
        ({"early_exit_scale": 1.5}, r"early_exit_scale: got 1.5, allowed \[0, 1\]"),
        ({"curriculum": "spiral"}, "curriculum: got 'spiral', allowed rotational | gradual | fixed | none"),
        ({"exit_weights": "cubic"}, "exit_weights: got 'cubic'"),
    ],
)
def test_exit_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EarlyExitCurriculum(**settings)


def test_interval_beyond_the_model_is_refused_in_setup():
    with pytest.raises(ConfigError, match=r"rotation_interval: got 7, allowed \[1, 6\]"):
        start(EarlyExitCurriculum(curriculum="rotational", rotation_interval=7), Host(), at(0))


def test_a_step_without_any_weight_is_refused_in_setup():
    callback = EarlyExitCurriculum(curriculum="rotational", rotation_interval=6, always_on_last=False)
    with pytest.raises(ConfigError, match="always_on_last: got False, allowed true here; step 0"):
        start(callback, Host(), at(0))


@pytest.mark.parametrize(
    "callback",
    [
        LayerDropoutCurriculum(max_dropout_rate=0.1, time_scale="exponential"),
        EarlyExitCurriculum(curriculum="gradual"),
    ],
)
def test_schedules_that_need_the_length_refuse_an_unbounded_run(callback):
    with pytest.raises(ConfigError, match=r"set trainer\.max_steps"):
        callback.setup(at(0, max_steps=-1), Host(), "fit")


@pytest.mark.parametrize("callback", [LayerDropoutCurriculum(), EarlyExitCurriculum()])
def test_a_module_that_is_no_host_is_refused(callback):
    with pytest.raises(ConfigError, match="model: got"):
        callback.setup(at(0), object(), "fit")
