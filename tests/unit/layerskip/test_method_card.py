"""The check values of the method card, read from the card itself."""

import re
from pathlib import Path

import pytest

import app.layerskip
from app.layerskip.exit_weights import exit_weight, normalised_exit_weights

CARD = (Path(app.layerskip.__file__).parent / "README.md").read_text("utf-8")
ROWS = [
    tuple(float(cell) for cell in row.strip("| \n").split("|"))
    for row in re.findall(r"^\| \d+ \| .*$", CARD.split("## Check values")[1].split("##")[0], re.MULTILINE)
]


def test_the_card_has_check_values():
    assert len(ROWS) == 3


@pytest.mark.parametrize(("num_layers", "scale", "last", "share"), ROWS)
def test_check_values_of_the_card_hold(num_layers, scale, last, share):
    num_layers = int(num_layers)
    assert exit_weight(num_layers - 1, num_layers=num_layers, early_exit_scale=scale) == pytest.approx(last)
    weights = normalised_exit_weights(range(1, num_layers + 1), num_layers=num_layers, early_exit_scale=scale)
    assert weights[num_layers] == pytest.approx(share, abs=5e-4)
