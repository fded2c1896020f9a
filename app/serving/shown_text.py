"""The part of a text that a client sees. Tested by tests/unit/serving/test_shown_text.py."""

from collections.abc import Sequence


class ShownText:
    """A text that arrives in pieces, up to the first of some stop strings.

    What could be the beginning of a stop string is held back until more of the text is there.

    Attributes:
        stopped: Whether a stop string has occurred; what is pushed afterwards is dropped.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held = tuple(stop), ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Return what can be shown now."""
        if self.stopped:
            return ""
        text = self._held + piece
        starts = [start for string in self._stop if (start := text.find(string)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        longest = max(map(len, self._stop), default=1) - 1
        beginnings = range(max(len(text) - longest, 0), len(text))
        begun = (i for i in beginnings if any(string.startswith(text[i:]) for string in self._stop))
        shown = next(begun, len(text))
        self._held = text[shown:]
        return text[:shown]

    def rest(self) -> str:
        """Return what was held back, when the text has ended."""
        held, self._held = self._held, ""
        return held
