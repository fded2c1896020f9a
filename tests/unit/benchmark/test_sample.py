import pytest

from app.benchmark.sample import pieces, round_table, sample_figure
from app.decoding.result import DecodingResult, Step

TEXT = dict(enumerate("abc|$\n`日 é"))


def decode(tokens: list[int]) -> str:
    return "".join(TEXT[token] for token in tokens)


@pytest.fixture
def result() -> DecodingResult:
    steps = (Step([1, 2, 3], 2, (4, 4)), Step([5], 0, (7,)), Step([8, 9, 1], 2))
    return DecodingResult(
        tokens=[0, 1, 2, 3, 5, 8],  # the last round goes beyond the end
        stop_reason="eos",
        seconds_prefill=0.0,
        seconds_decode=0.0,
        steps=steps,
    )


def test_each_token_is_told_by_its_origin_and_the_kept_ones_are_the_text(result: DecodingResult) -> None:
    found = pieces([2, 1], result, decode)
    assert [(piece.kind, piece.text) for piece in found] == [
        ("prompt", "cb"),
        ("full model", "a"),
        ("accepted", "bc"),
        ("rejected", "$$"),
        ("full model", "|"),
        ("rejected", "日"),
        ("full model", "\n"),
        ("accepted", " "),
    ]
    assert "".join(piece.text for piece in found[1:] if piece.kind != "rejected") == decode(result.tokens)


def test_the_table_has_a_row_a_round_and_no_cell_breaks_it(result: DecodingResult) -> None:
    assert round_table(pieces([2, 1], result, decode)).rows == [
        ("", "", "`a`"),
        ("`bc`", "`$$`", r"`\|`"),
        ("", "`日`", "`⏎`"),
        ("` ` (1 space)", "", ""),
    ]


def test_the_figure_draws_what_its_font_can_and_breaks_lines(result: DecodingResult) -> None:
    found = pieces([2, 1] * 100, result, decode)
    (axes,) = sample_figure(found, title="Step 1").axes
    drawn = [text.get_text() for text in axes.texts]
    assert drawn[:2] == ["Step 1", "accepted"]
    assert {"$$", "\N{WHITE SQUARE}", "⏎"} <= set(drawn)
    assert max(map(len, drawn)) == 52
    axes.figure.canvas.draw()  # without a warning of a glyph that is missing
    rejected = next(text for text in axes.texts if text.get_text() == "$$")
    assert rejected.get_color() != next(text for text in axes.texts if text.get_text() == "bc").get_color()
