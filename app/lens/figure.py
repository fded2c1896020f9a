"""The lens as one picture: the first prompt's grid of every model, and beside it how many layers all tokens needed.

Tested by tests/unit/lens/test_figure.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from app.benchmark.sample import drawable

_FEW, _BAND = 12, 30  # fewest and most places of tokens side by side; the title needs the former
_CELL = (0.5, 0.17)  # inches
_CHARACTERS = 8  # of a token in a cell
_SETTLED, _SETTLED_TEXT, _TEXT = "#e9e6df", "#615c54", "#1d1b18"
_CHANGING = LinearSegmentedColormap.from_list("changing", ["#fdeee2", "#f0803c"])
_BARS = "#1f6f78"
_LEGEND = (
    "Above each column: the generated token. Grey: this layer and all after it choose it.\n"
    "Orange: what a layer chooses before, the stronger the more probable."
)
_OWN_BLOCKS = " Rows such as 2+1: exits with blocks of their own."


def lens_figure(told: Mapping[str, Any]) -> Figure:
    """Draw what `app.lens.report.lens_as_json` told.

    Grey cells are settled: their row and all later ones choose the generated token, which stands above the column. The
    others are the more orange the more probable the row's first choice is.
    """
    num_tokens = max(len(run["tokens"]) for run in told["prompts"][0]["runs"])
    band = max(_FEW, -(-num_tokens // -(-num_tokens // _BAND)))  # as many tokens in each, but for the last one
    bands = [range(start, min(start + band, num_tokens)) for start in range(0, num_tokens, band)]
    num_rows = len(told["models"][0]["rows"])
    width = _CELL[0] * band + 3.6
    height = len(told["models"]) * (len(bands) * (_CELL[1] * (num_rows + 1) + 0.35) + 0.6) + 0.4
    figure = Figure(figsize=(width, height), layout="constrained")
    shares = (_CELL[0] * band, 2.4)
    axes = figure.subplots(len(told["models"]) * len(bands), 2, width_ratios=shares, squeeze=False)
    for number, (model, run) in enumerate(zip(told["models"], told["prompts"][0]["runs"], strict=True)):
        own = axes[number * len(bands) : (number + 1) * len(bands)]
        for (grid_axes, bars_axes), tokens in zip(own, bands, strict=True):
            _draw_grid(grid_axes, model, run, tokens, told["token_texts"])
            grid_axes.set_xlim(-0.5, band - 0.5)
            bars_axes.set_axis_off()
        needed = model["needed"]
        own[0, 0].set_title(
            f"{model['name']}: {needed['mean_saturation_layer']:.2f} of {model['num_layers']} layers needed"
            f" (first hit after {needed['mean_first_hit']:.2f}; all {needed['num_tokens']} tokens)",
            loc="left",
            fontsize="medium",
            parse_math=False,
            pad=16,
        )
        _draw_bars(own[0, 1], model)
    has_own_blocks = any(row["own_blocks"] for model in told["models"] for row in model["rows"])
    figure.supxlabel(_LEGEND + _OWN_BLOCKS * has_own_blocks, x=0.01, ha="left", fontsize=8)
    return figure


def _draw_grid(
    axes: Axes, model: Mapping[str, Any], run: Mapping[str, Any], tokens: Sequence[int], texts: Mapping[int, str]
) -> None:
    rows = model["rows"]
    colours = np.ones((len(rows), len(tokens), 4))
    for column, token in enumerate(tokens):
        if token >= len(run["tokens"]):  # the other model wrote more
            continue
        for index, row in enumerate(rows):
            settled = row["own_blocks"] is None and row["exit_layer"] >= run["saturation"][token]
            probability = run["top_probs"][index][token][0]
            colours[index, column] = mpl.colors.to_rgba(_SETTLED) if settled else _CHANGING(probability)
            text = _cell_text(texts[run["top_ids"][index][token][0]])
            _write(axes, column, index, text, color=_SETTLED_TEXT if settled else _TEXT)
        _write(axes, column, -1, _cell_text(texts[run["tokens"][token]]), color=_TEXT, weight="bold")
    axes.imshow(colours, aspect="auto", interpolation="nearest")
    axes.set_ylim(len(rows) - 0.5, -1.5)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=6)
    axes.set_xticks(np.arange(-0.5, len(tokens)), [], minor=False)
    axes.set_ylabel("layer", fontsize=7)
    axes.tick_params(length=0)
    axes.grid(which="major", axis="x", color="white", linewidth=1)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write(axes: Axes, column: int, row: int, text: str, **style: str) -> None:
    centred: dict[str, Any] = {
        "ha": "center",
        "va": "center",
        "fontsize": 6,
        "family": "monospace",
        "parse_math": False,
    }
    axes.text(column, row, text, in_layout=False, **(centred | style))


def _draw_bars(axes: Axes, model: Mapping[str, Any]) -> None:
    counts = model["needed"]["saturation_layers"]
    layers = range(1, len(counts) + 1)
    axes.set_axis_on()
    axes.barh(layers, [100 * count / sum(counts) for count in counts], color=_BARS)
    axes.set_ylim(len(counts) + 0.5, -0.5)
    axes.set_title("tokens by saturation layer (%)", fontsize=8, loc="left")
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _cell_text(text: str) -> str:
    """Cut a text to a cell, in which the font can draw it."""
    text = text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 1]}\N{HORIZONTAL ELLIPSIS}"
    return drawable(text, FontProperties(family="monospace"))
