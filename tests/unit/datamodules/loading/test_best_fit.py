from hypothesis import given
from hypothesis import strategies as st

from datamodules.loading.best_fit import best_fit


def slow_twin(sizes: list[int], *, capacity: int) -> list[list[int]]:
    """Look at every open row."""
    rows: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rooms = [capacity - sum(sizes[other] for other in row) - sizes[index] for row in rows]
        fitting = [room for room in rooms if room >= 0]
        if fitting:
            rows[rooms.index(min(fitting))].append(index)
        else:
            rows.append([index])
    return rows


@given(st.lists(st.integers(1, 20), max_size=40))
def test_pieces_go_longest_first_where_they_leave_the_least_room(sizes: list[int]) -> None:
    assert best_fit(sizes, capacity=20) == slow_twin(sizes, capacity=20)
