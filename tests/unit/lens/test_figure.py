import copy
import io

from matplotlib.colors import to_rgba

from app.lens.figure import lens_figure


def grids(figure):
    return [axes for axes in figure.axes if axes.images]


def test_settled_cells_are_grey_and_every_token_has_its_place_in_even_bands(told):
    figure = lens_figure(told)
    assert len(grids(figure)) == 2 * 2  # models, bands
    run = told["prompts"][0]["runs"][0]
    cells = grids(figure)[0].images[0].get_array()
    grey = [[tuple(cell) == to_rgba("#e9e6df") for cell in row] for row in cells]
    assert grey == [[layer >= run["saturation"][token] for token in range(18)] for layer in range(1, 5)]
    written = {text.get_position(): text.get_text() for text in grids(figure)[1].texts}
    assert {column for column, _ in written} == {*range(17)}  # the last 17 of 35 tokens
    assert written[0, 3][:7] == told["token_texts"][run["top_ids"][3][18][0]][:7]
    assert len({axes.get_xlim() for axes in grids(figure)}) == 1  # cells are equally wide
    assert "Grey: this layer and all after it choose it" in figure.get_supxlabel()
    bars = next(axes for axes in figure.axes if axes.patches)
    shares = [bar.get_width() for bar in bars.patches]
    counts = told["models"][0]["needed"]["saturation_layers"]
    assert shares == [100 * count / sum(counts) for count in counts]


def test_no_text_of_a_token_is_too_long_or_beyond_the_font_or_a_formula(told):
    odd = copy.deepcopy(told)
    odd["models"][0]["name"] = "$name"
    for token, text in zip(odd["token_texts"], ("$x$", "世界", "averylongtokenindeed", "\\frac{"), strict=False):
        odd["token_texts"][token] = text
    lens_figure(odd).savefig(io.BytesIO(), dpi=20)  # a warning of matplotlib would be an error here
    assert max(len(text.get_text()) for axes in grids(lens_figure(odd)) for text in axes.texts) == 8
