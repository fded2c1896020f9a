import pytest

from app.exits.layers_needed import LayersNeeded

# Whether exits 1, 2 and 3 of a model of four blocks choose the token; its saturation layer; its first hit.
TABLE = [
    ((True, True, True), 1, 1),
    ((False, True, True), 2, 2),
    ((True, False, True), 3, 1),  # a hit that is lost again
    ((False, True, False), 4, 2),
    ((True, True, False), 4, 1),
    ((False, False, False), 4, 4),
]


def test_layers_needed_are_those_of_a_table_made_by_hand():
    needed = LayersNeeded.of((matches for matches, *_ in TABLE), num_layers=4)
    assert needed.saturation == (1, 2, 3, 4, 4, 4)
    assert needed.hits == (1, 2, 1, 2, 1, 4)
    assert needed.as_dict() == {
        "num_tokens": 6,
        "mean_saturation_layer": 18 / 6,
        "mean_first_hit": 11 / 6,
        "saturation_layers": [1, 1, 1, 3],
        "first_hits": [3, 2, 0, 1],
    }


def test_a_total_counts_each_token_alike_and_not_each_text():
    short = LayersNeeded(num_layers=4, saturation=(4,), hits=(4,))
    long = LayersNeeded(num_layers=4, saturation=(1, 1, 2), hits=(1, 1, 1))
    assert LayersNeeded.total([short, long]).mean_saturation_layer == 2.0
    assert LayersNeeded.total([short, long]).mean_first_hit == pytest.approx(7 / 4)


def test_a_model_of_one_block_needs_it():
    assert LayersNeeded.of([(), ()], num_layers=1).saturation == (1, 1)
