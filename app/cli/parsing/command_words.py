"""Walks over the words of a command line. Tested by tests/contract/test_command_line.py."""

from collections.abc import Callable, Iterator, Sequence


def options_in_order(
    args: Sequence[str], takes_value: Callable[[str], object]
) -> Iterator[tuple[list[str], str, str | None]]:
    """Yield each option with its words and its value, and each other word as if it were an option without a value.

    Args:
        args: What stands on a command line, with values as in `--option=value` or `--option value`.
        takes_value: Tells of the name of an option, dashes included, whether the next word is its value.

    Yields:
        The words as they stand there, the option's name, and its value, or None if it has none.
    """
    remaining = iter(args)
    for arg in remaining:
        option, equals, value = arg.partition("=")
        following = None if equals or not takes_value(option) else next(remaining, None)
        yield [arg] if following is None else [arg, following], option, value if equals else following
