"""Walks through nested settings. Tested by tests/contract/test_command_line.py and test_resume.py."""

from collections.abc import Iterator, Mapping
from typing import Any


def walk(node: Any, path: str = "", *, into_lists: bool = True) -> Iterator[tuple[str, Any]]:
    """Yield every value in nested mappings, and in lists if wanted, with its path, which begins with `path`."""
    is_walked = into_lists and isinstance(node, list)
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node) if is_walked else ():
        below = f"{path}.{key}" if path else str(key)
        yield below, value
        yield from walk(value, below, into_lists=into_lists)
