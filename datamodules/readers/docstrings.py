"""The docstrings of a Python module, found by scanning its text, which takes a tenth of the time of parsing it."""

from __future__ import annotations

import ast
import inspect
import re

_STRING = (
    r'(?:"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'
    r"|'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'(?:[^'\\\n]|\\.)*')"
)
_NO_CODE = rf"#[^\n]*|{_STRING}"  # matched as a whole, so that nothing in it is taken for code
_DEFINITION = re.compile(rf"^(?P<indent>[ \t]*)(?:async[ \t]+)?(?:def|class)[ \t]+\w|{_NO_CODE}", re.DOTALL | re.M)
_HEADER_PART = re.compile(rf"(?P<open>[(\[{{])|(?P<close>[)\]}}])|(?P<colon>:)|{_NO_CODE}", re.DOTALL)
_LITERAL = re.compile(
    r"(?:[ \t\f]*(?:#[^\n]*)?\r?\n)*[ \t\f]*"  # lines without code
    rf"(?P<literal>[rRuU]?{_STRING}(?:[ \t]*[rRuU]?{_STRING})*)"
    r"[ \t]*(?:[#;\r\n]|\Z)",  # else it is a part of a longer expression
    re.DOTALL,
)


def docstrings(code: str, *, min_chars: int) -> list[str]:
    """The docstrings of a module, its classes and its functions, as `inspect.cleandoc` leaves them; outer ones first.

    Those shorter than `min_chars` (1 or more) are left out. One in parentheses is not found, and some may be missing
    where `code` is not valid Python.
    """
    matches = [match for match in _DEFINITION.finditer(code) if match["indent"] is not None]
    bodies = sorted((len(match["indent"]), _body(code, match.end())) for match in matches)  # outer ones first
    found = (_docstring(code, begin, min_chars=min_chars) for begin in [0, *(begin for _, begin in bodies)])
    return [docstring for docstring in found if len(docstring) >= min_chars]


def _body(code: str, at: int) -> int:
    """Where the body of the definition with its header at `at` begins: behind the first colon outside of brackets."""
    depth = 0
    for match in _HEADER_PART.finditer(code, at):
        depth += {"open": 1, "close": -1}.get(match.lastgroup or "", 0)
        if match.lastgroup == "colon" and depth == 0:
            return match.end()
    return len(code)


def _docstring(code: str, at: int, *, min_chars: int) -> str:
    """The docstring of the body that begins at `at`; "" if there is none of `min_chars` or more."""
    match = _LITERAL.match(code, at)
    if match is None or len(match["literal"]) < min_chars:
        return ""
    return inspect.cleandoc(ast.literal_eval(match["literal"]))
