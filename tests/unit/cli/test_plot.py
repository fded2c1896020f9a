import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from matplotlib.figure import Figure

from app.cli.plot import run
from app.errors import CheckpointError, ConfigError, DataError
from app.exits.quality import ExitScore
from app.exits.report import exit_curves_figure
from callbacks import ExitQualityMonitor
from tests.support.runs import curricula, make_data, make_module, make_trainer


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "parse_test.json"
    shares = {"exact_match": 0.5, "frame_match": 0.6, "well_formed": 0.9, "num_examples": 10}
    records = [{"exit_layer": layer, "num_draft_tokens": None} | shares for layer in (1, 2)]
    path.write_text(json.dumps({"stage": "test", "results": records}))
    return path


def _plot(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["layerskip", "plot", *args, "--overwrite", "true"])
    run()


def test_several_runs_are_drawn_into_one_png(
    tmp_path: Path, report: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "em.png"
    _plot(monkeypatch, "--results", f"baseline={report}", f"LD+EE={report}", "--output", str(output))
    assert output.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"figure: {output}\n"


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (["{report}"], "allowed LABEL=FILE"),
        (["={report}"], "allowed LABEL=FILE"),
        (["a={report}", "a={report}"], "a is there twice"),
    ],
)
def test_results_without_a_label_of_their_own_are_refused(
    results: list[str], message: str, tmp_path: Path, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [result.format(report=report) for result in results]
    with pytest.raises(ConfigError, match=f"results: got .*{message}"):
        _plot(monkeypatch, "--results", *named, "--output", str(tmp_path / "em.png"))
    assert not (tmp_path / "em.png").exists()


def test_what_holds_no_results_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content, found in (
        ("a", None, "No such file"),
        ("b", "{", "not JSON"),
        ("c", '{"x": 1}', "something else"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name}: no results of semantic parses \({found}"):
            _plot(monkeypatch, "--results", f"a={tmp_path}/{name}", "--output", str(tmp_path / "em.png"))


@pytest.mark.parametrize("name", ["parse_test.json", "my_model"])
def test_what_is_no_checkpoint_is_refused_by_its_field(
    name: str, tmp_path: Path, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_model").mkdir()
    with pytest.raises(ConfigError, match=rf"checkpoints: got .*{name}', allowed a checkpoint of layerskip fit"):
        _plot(monkeypatch, "--checkpoints", f"a={report.with_name(name)}", "--output", str(tmp_path / "curves.png"))


@pytest.mark.parametrize("name", ["em.jpg", "missing/em.png"])
def test_an_output_that_cannot_be_written_is_refused_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="output: got"):
        _plot(monkeypatch, "--results", "nothing", "--output", str(tmp_path / name))


def test_curves_are_drawn_over_the_tokens_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr("app.cli.plot.exit_curves_figure", lambda runs: drawn.update(runs) or exit_curves_figure(runs))
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[*curricula(), ExitQualityMonitor()], **settings)
    trainer.fit(make_module(), datamodule=make_data(tmp_path))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    output = tmp_path / "curves.png"
    _plot(monkeypatch, "--checkpoints", f"a={tmp_path}/run.ckpt", f"b={tmp_path}/run.ckpt", "--output", str(output))
    assert output.read_bytes().startswith(b"\x89PNG")
    assert set(drawn) == {"a", "b"}
    assert list(drawn["a"]) == pytest.approx([2 * 4 * 24, 4 * 4 * 24])  # steps, rows, tokens of a row
    assert set(drawn["a"][2 * 4 * 24]) == {1, 2, 3, 4}
    output.unlink()
    _plot(monkeypatch, "--checkpoints", f"a={tmp_path}/run.ckpt", "--output", str(output), "--exit_layer", "2")
    assert output.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="exit_layer: got 4, allowed an early exit that a measured: 1, 2, 3"):
        _plot(monkeypatch, "--checkpoints", f"a={tmp_path}/run.ckpt", "--output", str(output), "--exit_layer", "4")
    monkeypatch.setattr("app.cli.plot.early_exits_figure", lambda runs, metric: drawn.update(runs, metric=metric))
    monkeypatch.setattr("app.cli.plot.write_figure", lambda path, figure: None)
    five = [f"{index}={tmp_path}/run.ckpt" for index in range(5)]
    with pytest.raises(ConfigError, match=r"checkpoints: got 5, allowed 1\.\.4"):  # as many as line styles
        _plot(monkeypatch, "--checkpoints", *five, "--output", str(output))
    _plot(monkeypatch, "--checkpoints", *five, "--output", str(output), "--metric", "acceptance")
    assert drawn["metric"] == "acceptance"
    assert set(drawn["4"][2 * 4 * 24]) == {1, 2, 3}  # without the full model


@pytest.fixture
def exit_blocks_run(monkeypatch: pytest.MonkeyPatch) -> str:
    """A checkpoint of exit blocks at exits 1 and 2 of a deeper model, as far as a plot reads it."""
    config = {name: {} for name in ("model", "data", "trainer", "layer_dropout", "early_exit", "seed_everything")}
    config["model"] = {"pretrained": "x"}
    config["data"] = {"init_args": {"corpus": {"init_args": {"seq_len": 256, "packing": "split"}}}}
    history = {step: {1: (3.0, step / 1000, 1.0, math.nan), 2: (2.0, step / 500, 1.0, 0.25)} for step in (100, 200)}
    metadata = {
        "global_step": 400,
        "run_config": yaml.safe_dump(config),
        "exit_blocks": {1: [5], 2: [5]},
        "CachedStatesDataModule": {"batch_size": 4, "batches_per_step": 2},
        "callbacks": {"ExitQualityMonitor": {"history": history}},
    }
    monkeypatch.setattr("app.cli.plot.is_trained_weights", lambda path: True)
    monkeypatch.setattr("app.cli.plot.open_trained_weights", lambda path: SimpleNamespace(metadata=metadata))
    return "ours=blocks.ckpt"


def test_runs_of_exit_blocks_are_drawn_by_their_agreement_over_tokens(
    exit_blocks_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("app.cli.plot.write_figure", lambda path, figure: drawn.append(figure))
    given = ["--output", str(tmp_path / "curves.png"), "--checkpoints", exit_blocks_run]
    _plot(monkeypatch, *given)
    (axes,) = drawn[0].axes
    tokens = [100 * 4 * 2 * 256 / 1000, 200 * 4 * 2 * 256 / 1000]
    assert [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] == [
        ("ours, exit 2", tokens, pytest.approx([20.0, 40.0])),
        ("ours, exit 1", tokens, pytest.approx([10.0, 20.0])),
    ]
    with pytest.raises(ConfigError, match="exit_layer: got 1, allowed none with runs of exit blocks"):
        _plot(monkeypatch, *given, "--exit_layer", "1")


@pytest.mark.parametrize(
    "given",
    [
        ["--results", "a=b", "--metric", "agreement"],
        ["--checkpoints", "a=b", "--metric", "exact_match"],
        ["--checkpoints", "a=b", "--metric", "agreement", "--exit_layer", "1"],
    ],
)
def test_a_metric_of_another_picture_is_refused(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"metric: got .* agreement \| acceptance with checkpoints"):
        _plot(monkeypatch, *given, "--output", str(tmp_path / "curves.png"))


def test_a_checkpoint_without_measurements_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[])
    trainer.fit(make_module(), datamodule=make_data(tmp_path))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(CheckpointError, match=r"run\.ckpt: there is no measurement of callbacks\.ExitQualityMonitor"):
        _plot(monkeypatch, "--checkpoints", f"a={tmp_path}/run.ckpt", "--output", str(tmp_path / "curves.png"))


def test_results_of_parses_have_no_exit_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="exit_layer: got 2, allowed an exit with checkpoints"):
        _plot(monkeypatch, "--results", "a=b", "--exit_layer", "2", "--output", str(tmp_path / "em.png"))


@pytest.mark.parametrize("given", [["--results", "a=b", "--checkpoints", "a=b"], []])
def test_one_kind_of_picture_at_a_time(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="allowed either results or checkpoints"):
        _plot(monkeypatch, *given, "--output", str(tmp_path / "curves.png"))


def test_more_runs_than_colors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"checkpoints: got 9, allowed 1\.\.8"):
        _plot(monkeypatch, "--checkpoints", *[f"{i}=x" for i in range(9)], "--output", str(tmp_path / "curves.png"))


def test_every_early_exit_is_a_line_of_the_runs_style_and_the_full_model_is_beside_them() -> None:
    first, second = ({1: ExitScore(5.0 - i, 0.1), 4: ExitScore(3.0 - i, 1.0)} for i in (0, 1))
    curve = {100: first, 200: second}
    exits, full = exit_curves_figure({"ours": curve, "control": {100: curve[100]}}).axes
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in exits.lines] == [
        ([0.1, 0.2], pytest.approx([10.0, 10.0])),
        ([0.1], [10.0]),
    ]
    assert [line.get_linestyle() for line in exits.lines] == ["-", "--"]
    assert [list(line.get_ydata()) for line in full.lines] == [[3.0, 2.0], [3.0]]


def test_of_many_exits_some_at_even_distances_are_drawn() -> None:
    scores = {layer: ExitScore(3.0, layer / 24) for layer in range(1, 25)}
    exits, _ = exit_curves_figure({"ours": {100: scores}}).axes
    assert [line.get_ydata()[0] * 24 / 100 for line in exits.lines] == pytest.approx([4, 8, 12, 16, 20])
