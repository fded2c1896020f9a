"""Walks over the words of a command line. Tested by tests/contract/test_command_line.py."""

from collections.abc import Callable, Iterator, Sequence


def options_in_order(
    args: Sequence[str], takes_value: Callable[[str], object]
) -> Iterator[tuple[list[str], str, str | None]]:
    """Yield the words of each option as they stand in `args`, its name, and its value, or None if it has none.

    Each other word counts as an option without a value. `takes_value` tells of the name of an option, dashes included,
    whether the next word is its value.
    """
    remaining = iter(args)
    for arg in remaining:
        option, equals, value = arg.partition("=")
        following = None if equals or not takes_value(option) else next(remaining, None)
        yield [arg] if following is None else [arg, following], option, value if equals else following
