"""The register of upstream names in app/README.md: whole, not more than whole, and of the releases that are locked."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.upstream_touches import ROOT, is_private, matches_messages, private_touches, source_files

REGISTER = (ROOT / "app" / "README.md").read_text("utf-8").partition("\n## Names of upstreams that may move\n")[2]
_CODE = re.compile(r"`` (.+?) ``|`([^`]+)`")
SOURCES = source_files()


class Row(NamedTuple):
    files: list[str]
    names: list[str]
    is_message: bool
    tests: list[str]


def _in_code(cell: str) -> list[str]:
    return [spaced.strip() or plain for spaced, plain in _CODE.findall(cell)]


ROWS = [
    Row(_in_code(cells[0]), _in_code(cells[1]), cells[1].strip().startswith("message"), _in_code(cells[3]))
    for line in REGISTER.splitlines()
    if line.startswith("| `") and len(cells := line.strip("|").split(" | ")) == 4
]


@pytest.fixture(scope="module")
def touched() -> dict[str, set[str]]:
    """The private names of others in each file, by the file's path in the tree."""
    return {_in_tree(path): private_touches(path) for path in SOURCES}


def test_every_private_name_that_is_touched_is_listed_and_none_else(touched: dict[str, set[str]]) -> None:
    listed = {(file, name) for row in ROWS for file in row.files for name in row.names if not row.is_message}
    private = {(file, name) for file, name in listed if any(map(is_private, name.split(".")))}
    # Of names that only files of others hold (pickled ones), the text is all there is.
    quoted = {(file, name) for file, name in private if f'"{name}"' in (ROOT / file).read_text("utf-8")}
    found = {(file, name) for file, names in touched.items() for name in names}
    assert found - listed == set()
    assert private - quoted - found == set()


def test_every_listed_name_stands_in_its_file_and_every_test_exists() -> None:
    assert len(ROWS) == REGISTER.count("\n| `")
    for row in ROWS:
        assert row.files
        assert row.names
        assert row.tests
        assert all((ROOT / test).is_file() for test in row.tests), row.tests
        for file in row.files:
            text = (ROOT / file).read_text("utf-8")
            absent = [name for name in map(_as_written, row.names) if name not in text]
            assert not absent, (file, absent)


def test_files_that_match_an_upstreams_words_are_listed() -> None:
    listed = {file for row in ROWS if row.is_message for file in row.files}
    assert {_in_tree(path) for path in SOURCES if matches_messages(path)} <= listed


def test_the_tables_are_of_the_locked_releases() -> None:
    locked = dict(re.findall(r"^([\w-]+)==(\d+\.\d+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    tables = re.findall(r"^### ([\w-]+) (\S+)$", REGISTER, re.MULTILINE)
    assert tables
    for package, release in tables:
        assert locked[package] == release, f"look at the names of {package} again, then write {locked[package]}"


def test_the_rules_find_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "probe.py").write_text(
        "import re\n"
        "import torch._dynamo\n"
        "from lightning.pytorch import Callback, Trainer\n"
        "from lightning.pytorch.callbacks import ModelCheckpoint\n"
        "from torch.utils._pytree import tree_map\n"
        "class Own(ModelCheckpoint):\n"
        "    def _save_checkpoint(self, *args): self._mine = getattr(args[0], '_hidden', None)\n"
        "    def also(self): return self._mine, self._last_checkpoint_saved\n"
        "def of_others(trainer): trainer._results = 1; return trainer.state._replace()\n"
        "def words(error): return re.search('x', str(error))\n"
    )
    monkeypatch.setattr("tests.support.upstream_touches.ROOT", tmp_path)
    monkeypatch.setattr("app.__path__", [str(folder)])
    expected = {
        "torch._dynamo",
        "torch.utils._pytree.tree_map",
        "_save_checkpoint",
        "_hidden",
        "_last_checkpoint_saved",
    }
    assert private_touches(folder / "probe.py") == expected | {"_results"}
    assert matches_messages(folder / "probe.py")


def _in_tree(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _as_written(name: str) -> str:
    """Of what is imported, `from module import name`, the name."""
    return name.rpartition(".")[2] if name.startswith("torch.") else name
