import pytest

from app.serving.shown_text import ShownText


@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [
        ([], "all of it", "all of it"),
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"),
        (["abc"], "ababcab", "ab"),
        (["aab"], "aaab", "a"),
        (["END", "N"], "the EN", "the E"),
        (["xyz"], "an unfinished xy", "an unfinished xy"),
    ],
)
def test_a_text_ends_before_the_first_stop_string_in_whatever_pieces_it_comes(stop, text, shown):
    for size in range(1, len(text) + 1):
        part = ShownText(stop)
        pieces = [part.push(text[start : start + size]) for start in range(0, len(text), size)]
        assert "".join([*pieces, part.rest()]) == shown
        assert part.stopped == (shown != text)
        assert part.push("more") == ("" if part.stopped else "more")


def test_only_what_can_begin_a_stop_string_is_held_back():
    part = ShownText(["stop"])
    assert [part.push(piece) for piece in ("a s", "t", "and st", "o", "ne")] == ["a ", "", "stand ", "", "stone"]
