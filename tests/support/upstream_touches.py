"""Where this tree touches private names of an upstream: the rules by which the register of app/README.md is whole."""

import ast
import importlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("app", "callbacks", "datamodules")
_DOCUMENTED = {"_asdict", "_fields", "_make", "_replace", "_exit"}  # of named tuples, and os._exit
_BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}
_MATCHING = {"search", "match", "fullmatch", "findall", "finditer", "partition", "rpartition", "startswith", "endswith"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != "" and name not in _DOCUMENTED


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def private_touches(path: Path) -> set[str]:
    """Private names of others in a file: of imports the whole path, of attributes the name."""
    tree = ast.parse(path.read_text("utf-8"))
    own = {name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for name in _members(node)}
    theirs, ours = _inherited(path, tree)
    own |= ours
    found = set(filter(is_private, theirs))
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names if any(map(is_private, alias.name.split(".")))}
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] not in PACKAGES:
                whole = (f"{module}.{alias.name}" for alias in names)
                found |= {name for name in whole if any(map(is_private, name.split(".")))}
            case ast.Attribute(attr=name) if is_private(name) and name not in own:
                found.add(name)
            case ast.Call(func=ast.Name(id=function), args=[_, ast.Constant(value=str(name)), *_]):
                if function in _BY_NAME and is_private(name):
                    found.add(name)
    return found


def matches_messages(path: Path) -> bool:
    """Whether the file looks for words in an upstream's errors or warnings."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Call(func=ast.Attribute(attr="filterwarnings"), keywords=keywords):
                if any(keyword.arg == "message" for keyword in keywords):
                    return True
            case ast.Call(func=ast.Attribute(attr=name, value=value), args=args) if name in _MATCHING:
                if any(map(_is_text_of_error, [value, *args])):
                    return True
            case ast.Compare(ops=[ast.In() | ast.NotIn()], comparators=[text]) if _is_text_of_error(text):
                return True
    return False


def _is_text_of_error(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="str"), args=[ast.Name(id=name)]):
            return name in ("error", "cause", "exception", "ex", "e")
    return False


def _members(node: ast.ClassDef) -> Iterator[str]:
    """What a class defines: methods, fields, and what its methods set on self."""
    for member in ast.walk(node):
        match member:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls"), ctx=ast.Store()):
                yield name
    for member in node.body:
        match member:
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                yield name


@cache
def _classes_of(module: str) -> dict[str, ast.ClassDef]:
    path = getattr(sys.modules.get(module), "__file__", None) or ""
    tree = ast.parse(Path(path).read_text("utf-8") if path.endswith(".py") else "")
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


@cache
def _members_of(kind: type) -> frozenset[str]:
    node = _classes_of(kind.__module__).get(kind.__name__)
    return frozenset(_members(node) if node else vars(kind))


def _inherited(path: Path, tree: ast.Module) -> tuple[set[str], set[str]]:
    """What classes of the file define, or use on self, that a base class has, too: of an upstream, of this tree.

    Of a file that needs an extra that is not installed, all that classes with a base define counts as an upstream's.
    """
    theirs, ours = set(), set()
    try:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    except ModuleNotFoundError:
        derived = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
        return {name for node in derived for name in _members(node) if name != node.name}, ours
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            used = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)} | set(_members(node))
            for base in getattr(module, node.name).__mro__[1:]:
                package = base.__module__.split(".")[0]
                if package in PACKAGES:
                    ours |= used & _members_of(base)
                elif package not in sys.stdlib_module_names:
                    theirs |= used & _members_of(base)
    return theirs, ours
