"""English that depends on numbers."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 prompt`, `1200 prompts`: a number of things whose plural ends in s."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
