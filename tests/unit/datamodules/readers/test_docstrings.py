import ast
from pathlib import Path

import pytest

from datamodules.readers.files import list_files
from datamodules.readers.sources import Source
from datamodules.readers.whole_files import docstrings

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MODULES = {
    "nothing": "",
    "only code": "x = 1\n",
    "module, class and methods, outer ones first": '''#!shebang
# a comment

"""Of the module."""
class A:
    """Of A."""
    def f(self):
        """Of f."""
        def g(): "Of g."
    async def h(self): r"""Of \\h."""
def last():
    """Of last."""
''',
    "headers with colons, brackets and strings": '''
def f(a: "no docstring:" = {1: "x"}, *, b=lambda x: "no docstring",  # "):
      c: str = """
def g():
    'no code'
"""
) -> dict[str, "no docstring:"]:
    # a comment
\t
    """Of f."""  # behind it
class B(Base, metaclass={"a":  # :
        Meta}[0]):
    u"Of B."; x = 1
''',
    "a string that begins a longer expression": '''
def f():
    """No docstring, %s.""" % 1
def g():
    "No docstring".strip()
def h():
    "No docstring", 1
''',
    "strings that are no text": """
def f(): b"bytes"
def g(): f"formatted"
def h(): rb'bytes'
""",
    "the first statement is another one": '''
def f():
    pass
    """No docstring."""
def g(): return {"a":
    "no docstring"}
class A: pass
"""No docstring."""
''',
    "what looks like code in strings": '''
"""
def no():
    'Code.'
"""
x = 'def no(): "Code."'
y = "\\"def no(): 'Code.'"  # def no(): "Code."
z = """ "" \\""" def no():
"""
''',
    "joined literals, escapes and indentation": '''
def f():
    "One, " 'two, ' r"three\\n"
def g():
    """First.

        Indented\\tmore. ""Quoted"" \\"\\"\\"
    Back."""
def h(): '\\'quoted\\' \\
and continued'
''',
    "Windows line ends": 'def f():\r\n    # note\r\n    """Of\r\n    f."""\r\n',
    "no line end at the end": 'class A: "Of A."',
    "names that begin like keywords": 'define = 1\nclassic = {1:\n"no docstring"}\ndefault: "no docstring"\n',
}


def parsed(code: str, *, min_chars: int) -> list[str]:
    """The slow twin."""
    found = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(code)) if isinstance(node, DOCUMENTED)]
    return [docstring for docstring in found if len(docstring) >= min_chars]


@pytest.mark.parametrize("name", MODULES)
def test_scanning_finds_what_parsing_finds(name: str) -> None:
    found = docstrings(MODULES[name], min_chars=1)
    assert found == parsed(MODULES[name], min_chars=1)
    assert not any("No docstring" in docstring or "no docstring" in docstring for docstring in found)


def test_the_cases_are_not_empty() -> None:
    counts = [len(docstrings(code, min_chars=1)) for code in MODULES.values()]
    assert sum(counts) == 6 + 2 + 1 + 3 + 1 + 1
    assert docstrings(MODULES["module, class and methods, outer ones first"], min_chars=1) == [
        *("Of the module.", "Of A.", "Of last.", "Of f.", "Of \\h.", "Of g."),
    ]


@pytest.mark.parametrize("length", [9, 10, 11])
def test_short_ones_are_left_out(length: int) -> None:
    code = f"def f(): {'x' * length!r}"
    assert docstrings(code, min_chars=10) == parsed(code, min_chars=10) == (["x" * length] if length >= 10 else [])
    assert docstrings("def f(): '            x'", min_chars=10) == []  # its literal is long


def test_scanning_the_standard_library_finds_what_parsing_finds() -> None:
    files = list_files(Source(kind="stdlib_text", name="text"))
    some = [files.path(file) for file in range(0, len(files), 20)]
    assert sum(len(_assert_same(path)) for path in some) > 50


def _assert_same(path: Path) -> list[str]:
    code = path.read_text("utf-8")
    found = docstrings(code, min_chars=80)
    assert found == parsed(code, min_chars=80), path.name
    return found


def test_of_a_broken_module_what_is_there_is_found() -> None:
    assert docstrings('def f():\n    "Of f."\ndef g(:', min_chars=1) == ["Of f."]
    with pytest.raises(SyntaxError):
        docstrings('"\\x"', min_chars=1)
