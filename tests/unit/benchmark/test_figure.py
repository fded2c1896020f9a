from dataclasses import replace
from pathlib import Path

import pytest

from app.benchmark.figure import benchmark_figure
from app.benchmark.result import BenchmarkResult
from tests.unit.benchmark.made_up import DRAFTS, PLAIN


def _sweep(exits: int, *, strategy: str = "self_speculative") -> list[BenchmarkResult]:
    """Results of several exits, each with two draft lengths."""
    return [
        replace(DRAFTS, strategy=strategy, exit_layer=exit_layer, num_draft_tokens=drafts)
        for exit_layer in range(1, exits + 1)
        for drafts in (4, 2)
    ]


@pytest.mark.parametrize("exits", [1, 5])
def test_the_figure_has_labelled_axes_and_a_line_for_each_exit(exits: int) -> None:
    figure = benchmark_figure([PLAIN, *_sweep(exits)], title="the model")
    speed, acceptance = figure.axes
    for axes in (speed, acceptance):
        assert axes.get_title()
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    assert len(speed.lines) == exits + 1  # and break-even
    assert list(speed.lines[0].get_xdata()) == pytest.approx([2, 4], abs=0.2)
    assert list(speed.lines[0].get_ydata()) == [1.5, 1.5]
    assert [line.get_xdata()[0] for line in speed.lines[:exits]] == sorted(
        {c.lines[0].get_xdata()[0] for c in speed.containers}
    )
    for container in speed.containers:
        (bars,) = container.lines[2]
        assert [list(ends[:, 1]) for ends in bars.get_segments()] == [pytest.approx([1.25, 1.8])] * 2
    assert set(speed.lines[-1].get_ydata()) == {1.0}
    assert len(acceptance.lines) == exits
    assert list(acceptance.lines[0].get_xdata()) == [1, 2, 3]
    assert list(acceptance.lines[0].get_ydata()) == pytest.approx([80.0, 75.0, 50.0])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [*(f"exit {i + 1}" for i in range(exits)), "self_speculative", "autoregressive (break-even)"]
    assert len({line.get_color() if isinstance(line.get_color(), str) else tuple(line.get_color())
                for line in acceptance.lines}) == exits  # fmt: skip


def test_the_figure_draws_what_has_no_exit_and_of_transformers_the_fastest_exit() -> None:
    results = [
        PLAIN,
        replace(PLAIN, strategy="transformers", speedup=0.6),
        replace(DRAFTS, strategy="draft_model", exit_layer=None),
        *(
            replace(result, speedup=0.1 * idx, speedup_interval=None)
            for idx, result in enumerate(_sweep(2, strategy="transformers_early_exit"))
        ),
    ]
    results[-1] = replace(results[-1], speedup=None, reached_by_position=[], accepted_by_position=[])
    figure = benchmark_figure(results, title="t")
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"transformers_early_exit", "draft_model", "autoregressive (break-even)", "transformers"}
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [
        pytest.approx(speedups) for speedups in ([0.1, 0.2], [1.5], [1.0, 1.0], [0.6, 0.6])
    ]


def test_where_nobody_drafts_the_figure_has_a_bar_for_each(tmp_path: Path) -> None:
    figure = benchmark_figure([PLAIN, replace(PLAIN, strategy="early_exit", exit_layer=2, speedup=None)], title="t")
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1.0, 0.0]
    figure.savefig(tmp_path / "figure.png")
