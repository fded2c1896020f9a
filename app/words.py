"""English that depends on numbers."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 prompt`, `1200 prompts`: a number of things whose plural ends in s."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def counted_of(number: int, whole: int, noun: str) -> str:
    """`3 of 12 prompts` where that is not all of them, else `12 prompts`."""
    return counted(whole, noun) if number == whole else f"{number} of {counted(whole, noun)}"
