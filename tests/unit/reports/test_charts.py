import math
import re

from app.reports.charts import Chart, Line, draw, some_exits


def _chart(*lines: Line, **settings: object) -> Chart:
    return Chart(name="c", title="t", x_label="step", y_label="loss", lines=lines, **settings)


def _points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_values_lie_where_the_axes_say():
    drawing = draw(_chart(Line("a", "run-0", {10: 2.0, 20: 3.0, 30: 2.5})))
    ((_, path, marks),) = drawing.paths
    ticks = {float(text): y for y, text in drawing.y_ticks}
    assert [y for _, y in _points(path)] == [ticks[2.0], ticks[3.0], (ticks[2.0] + ticks[3.0]) / 2]
    assert _points(path)[0][0] == drawing.left
    assert _points(path)[-1][0] == drawing.right
    assert [words for *_, words in marks] == ["a: 2 at 10", "a: 3 at 20", "a: 2.5 at 30"]


def test_no_label_of_an_axis_is_cut_off():
    drawing = draw(_chart(Line("a", "run-0", {0: 100_000.0, 100_000: 120_000.0})))
    x, text = drawing.x_ticks[-1]
    assert (x, text) == (drawing.right, "100,000")
    assert x + 6.6 * len(text) / 2 <= drawing.width  # of letters 6.6 wide
    assert drawing.left - 7 >= 7.6 * max(len(label) for _, label in drawing.y_ticks)  # of digits 7.6 wide


def test_what_is_not_finite_leaves_a_gap():
    ((_, path, marks),) = draw(_chart(Line("a", "run-0", {1: 1.0, 2: math.nan, 3: 2.0, 4: 1.0}))).paths
    assert re.sub(r"[\d. ]+", "", path) == "MML"
    assert len(marks) == 3
    ((_, path, _),) = draw(_chart(Line("a", "run-0", {1: math.inf}))).paths
    assert path == ""


def test_many_points_become_means_and_the_chart_says_so():
    chart = _chart(Line("a", "run-0", {step: float(step % 2) for step in range(6000)}))
    ((_, path, marks),) = draw(chart).paths
    assert len({y for _, y in _points(path)}) == 1  # each interval has both values equally often
    assert len(_points(path)) == 300
    assert marks == []
    assert "means of 300 intervals" in chart.note


def test_charts_that_share_a_range_have_the_same_axis():
    one, other = (
        draw(_chart(Line("a", "run-0", points), also_in_range=(1.0, 9.0))) for points in ({1: 1.0}, {1: 9.0, 2: 5.0})
    )
    assert one.y_ticks == other.y_ticks


def test_some_of_many_exits_are_drawn_in_the_order_of_their_shades():
    styles = some_exits(range(1, 25), num_layers=24)
    assert (
        styles == {4: "exit-0", 8: "exit-1", 12: "exit-2", 16: "exit-4", 20: "exit-5", 24: "full"} or len(styles) == 6
    )
    assert [*styles][-1] == 24
    assert some_exits([3, 4], num_layers=4) == {3: "exit-0", 4: "full"}


def test_names_of_lines_stay_within_the_width():
    drawing = draw(_chart(*(Line(f"a long name of run {idx}", f"run-{idx}", {1: 1.0}) for idx in range(6))))
    assert len({y for _, y, *_ in drawing.legend}) > 1
    assert max(y for _, y, *_ in drawing.legend) < drawing.height
