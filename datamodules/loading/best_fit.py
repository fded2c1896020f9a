"""Best fit decreasing: pieces packed into rows, the longest first, each where it leaves the least room.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(sizes: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Pack rows of at most `capacity`, lists of indices into `sizes` (1 to `capacity`), with every index in one row."""
    rows: list[list[int]] = []
    by_room: list[tuple[int, int]] = []  # (room, row) of rows with room, ascending
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):  # stable
        at = bisect_left(by_room, (sizes[index], 0))
        if at < len(by_room):
            room, row = by_room.pop(at)
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        if room > sizes[index]:
            insort(by_room, (room - sizes[index], row))
    return rows
