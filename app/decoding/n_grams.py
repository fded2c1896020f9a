"""Drafts that cost nothing: what followed the latest tokens where they occurred before, in prompt or output.

Tested by tests/unit/decoding/test_n_grams.py.
"""

from collections.abc import Sequence

_LONGEST_MATCH = 8  # tokens; where so many agree, more of them hardly make a draft any better


class NGramIndex:
    """A growing text that knows where its latest tokens occurred before.

    The runs of `match` to 8 tokens (of `match` alone if that is more) lead to the position that followed their latest
    occurrence. Each new token adds at most one entry for each length, and nothing is looked through again.

    Args:
        tokens: The text so far.
        match: Fewest tokens that must have occurred before, at least 1.
    """

    def __init__(self, tokens: Sequence[int], *, match: int) -> None:
        self._tokens: list[int] = []
        self._lengths = range(match, max(match, _LONGEST_MATCH) + 1)
        self._followed_at: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text. What the text ends with is noted only when a token follows it."""
        for token in tokens:
            position = len(self._tokens)
            for length in self._lengths:
                if length > position:
                    break
                self._followed_at[tuple(self._tokens[position - length :])] = position
            self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """At most `most` tokens: what followed the longest run of latest tokens that occurred before.

        Of several occurrences the latest counts. Where what followed reaches the end of the text, the draft goes on
        with its own tokens, so that a text that repeats itself is drafted to any length. The draft is empty if so many
        tokens have not occurred before.
        """
        text, start = self._tokens, None
        for length in self._lengths:
            if length > len(text) or (found := self._followed_at.get(tuple(text[-length:]))) is None:
                break  # where a run has not occurred, no longer one has
            start = found
        drafted: list[int] = []
        if start is not None:
            for position in range(start, start + most):
                drafted.append(text[position] if position < len(text) else drafted[position - len(text)])
        return drafted
