"""Draws what answers at confident exits give over what they cost. Tested by test_confident_exits.py."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from app.exits.confident_exit import MEAN_BLOCKS, WAYS, WAYS_TITLE, ConfidentExit, Way

_STYLES: dict[Way, dict[str, object]] = {
    "exit": {"color": "tab:gray", "marker": "s", "linestyle": "--"},
    "threshold": {"color": "tab:blue", "marker": "o"},
    "held_out": {"color": "tab:orange", "marker": "*", "markersize": 13, "linestyle": "none"},
}


def confident_exits_figure(found: Sequence[ConfidentExit], *, title: str) -> Figure:
    """One panel for each task: right answers over mean blocks, of fixed exits and of thresholds.

    Args:
        found: From `confident_exits`, of at least one task.
        title: What was measured.
    """
    tasks = list(dict.fromkeys(each.task for each in found))
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(5.6 * columns, 4.4 * rows + 0.6), layout="constrained")
    figure.suptitle(f"{title}: {WAYS_TITLE}", fontsize="medium")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for task, axes in zip(tasks, panels, strict=False):
        _panel(axes, [each for each in found if each.task == task])
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns + 1, 4), frameon=False, fontsize="small"
    )
    return figure


def _panel(axes: Axes, found: Sequence[ConfidentExit]) -> None:
    for way, style in _STYLES.items():
        own = sorted((each for each in found if each.way == way), key=lambda each: each.mean_blocks)
        points = [each.mean_blocks for each in own], [100 * each.score for each in own]
        axes.plot(*points, label=WAYS[way], **style)  # type: ignore[arg-type]
        if way == "threshold":
            _name_thresholds(axes, own)
    deepest = [each for each in found if each.way == "exit"][-1]
    bounds = (100 * deepest.low, 100 * deepest.high)
    axes.axhspan(*bounds, color="tab:gray", alpha=0.12, linewidth=0, label="95 % interval of the deepest exit")
    axes.set_title(f"{deepest.task}, n = {deepest.num_examples}", fontsize="medium")
    axes.set(xlabel=MEAN_BLOCKS, ylabel=f"right answers ({deepest.metric}), %")
    axes.grid(alpha=0.3)


def _name_thresholds(axes: Axes, found: Sequence[ConfidentExit]) -> None:
    """Write each threshold at its point, unless that is so close to a named one that the names would collide."""
    width, height = axes.dataLim.width, axes.dataLim.height
    named: list[ConfidentExit] = []
    for each in found:
        near = (
            abs(each.mean_blocks - other.mean_blocks) <= 0.06 * width
            and abs(100 * (each.score - other.score)) <= 0.06 * height
            for other in named
        )
        if not any(near):
            named.append(each)
            at = each.mean_blocks, 100 * each.score
            axes.annotate(f"{each.threshold:g}", at, xytext=(0, 6), textcoords="offset points", fontsize="small")
