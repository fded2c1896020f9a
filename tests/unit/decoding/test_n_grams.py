"""What the latest tokens were followed by before: an index that grows, against a search of the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.decoding.n_grams import NGramIndex


def _by_search(text: list[int], *, match: int, most: int) -> list[int]:
    """The slow twin: look at every earlier place for every length, the longest first and the latest place first."""
    for length in range(max(match, 8), match - 1, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if length <= len(text) and text[end - length : end] == text[len(text) - length :]:
                whole = list(text)
                for position in range(end, end + most):
                    whole.append(whole[position])
                return whole[len(text) :]
    return []


@given(
    parts=st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=8),
    match=st.integers(1, 10),
    most=st.integers(0, 12),
)
def test_an_index_that_grows_finds_what_a_search_of_the_whole_text_finds(
    parts: list[list[int]], match: int, most: int
) -> None:
    index, text = NGramIndex(parts[0], match=match), list(parts[0])
    assert index.draft(most) == _by_search(text, match=match, most=most)
    for part in parts[1:]:
        index.extend(part)
        text += part
        assert index.draft(most) == _by_search(text, match=match, most=most)


@pytest.mark.parametrize(
    ("text", "match", "expected"),
    [
        ([], 1, []),
        ([7], 1, []),  # has not occurred before
        ([7, 7], 1, [7, 7, 7, 7]),
        ([1, 2, 3, 9, 1, 2, 3], 3, [9, 1, 2, 3]),
        ([1, 2, 3, 9, 1, 2, 3], 4, []),
        ([1, 2, 8, 1, 2, 9, 1, 2], 2, [9, 1, 2, 9]),  # the latest occurrence, then the draft's own tokens
        ([1, 2, 3, 8, 5, 2, 3, 9, 1, 2, 3], 2, [8, 5, 2, 3]),  # a longer match counts more than a later one
        ([1, 2, 1, 2, 1], 1, [2, 1, 2, 1]),
    ],
)
def test_cases_by_hand(text: list[int], match: int, expected: list[int]) -> None:
    assert NGramIndex(text, match=match).draft(4) == expected
