from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from app.cli.plot import run
from app.errors import ConfigError, DataError


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "parse_test.json"
    shares = {"exact_match": 0.5, "frame_match": 0.6, "well_formed": 0.9, "num_examples": 10}
    records = [{"exit_layer": layer, "num_draft_tokens": None} | shares for layer in (1, 2)]
    path.write_text(json.dumps({"stage": "test", "results": records}))
    return path


def _plot(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["layerskip", "plot", *args])
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


def test_a_missing_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: no results"):
        _plot(monkeypatch, "--results", f"a={tmp_path}/nowhere.json", "--output", str(tmp_path / "em.png"))


@pytest.mark.parametrize("name", ["em.jpg", "missing/em.png"])
def test_an_output_that_cannot_be_written_is_refused_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="output: got"):
        _plot(monkeypatch, "--results", "nothing", "--output", str(tmp_path / name))


def test_results_must_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        _plot(monkeypatch, "--output", str(tmp_path / "em.png"))
    assert "error: results: required" in capsys.readouterr().err
