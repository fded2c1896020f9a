import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import DataError
from datamodules.readers.files import list_files
from datamodules.readers.sources import Source

NAMES = ("a.py", "b.txt", ".hidden.py", "src/a.py", "src/deep/b.py", "src/deep/[x].py", "build/a.py", "vendor/src/a.py")


def listed(folder: Path, **settings: Any) -> list[str]:
    files = list_files(Source(name="notes", kind="files", path=str(folder), **settings))
    return [files.name(file) for file in range(len(files))]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


GLOB_PARTS = st.sampled_from(
    [
        "**",
        "*",
        "*.py",
        "?.py",
        "[ab].py",
        "[!a].*",
        "src",
        "deep",
        "a.py",
        "[[]x].py",
        "[]x]*",
        "[z-a].py",
        "[x",
        "[!!]*",
    ]
)


@given(st.lists(GLOB_PARTS, min_size=1, max_size=4))
def test_a_glob_chooses_what_pathlib_would(tree: Path, parts: list[str]) -> None:
    pattern = "/".join(parts)
    expected = {file.relative_to(tree).as_posix() for file in tree.glob(pattern) if file.is_file()}
    if parts[-1] == "**":  # of which pathlib says "all folders", and users mean all files in them
        expected = {file.relative_to(tree).as_posix() for file in tree.glob(pattern + "/*") if file.is_file()}
    try:
        found = set(listed(tree, glob=pattern))
    except DataError:
        found = set()
    assert found == expected


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        (("build/",), {"build/a.py"}),
        (("/src/",), {"src/a.py", "src/deep/b.py", "src/deep/[x].py"}),
        (("src/",), {"src/a.py", "src/deep/b.py", "src/deep/[x].py", "vendor/src/a.py"}),
        (("*.py", "!b.py"), set(NAMES) - {"b.txt", "src/deep/b.py"}),
        (("src/deep/", "!src/deep/b.py"), {"src/deep/b.py", "src/deep/[x].py"}),  # as git: the folder is not entered
        (("# a.py", ""), set()),
    ],
)
def test_excludes_mean_what_they_mean_to_git(tree: Path, exclude: tuple[str, ...], left_out: set[str]) -> None:
    assert set(listed(tree, exclude=exclude)) == set(NAMES) - left_out


def test_a_gitignore_in_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    (tmp_path / ".gitignore").write_text("*")
    assert listed(tmp_path) == [".gitignore", "a.py"]


def test_names_are_sorted_by_their_bytes_and_keep_their_sizes(tmp_path: Path) -> None:
    names = ["Z", "a", "a-b", "a/x", "é", "\udcff", "😀", "\uffee"]
    (tmp_path / "a").mkdir()
    for size, name in enumerate(names := [name for name in names if name != "a"]):
        (tmp_path / name).write_bytes(b"x" * size)
    files = list_files(Source(name="notes", kind="files", path=str(tmp_path)))
    found = [files.name(file) for file in range(len(files))]
    assert found == sorted(names, key=os.fsencode) != sorted(names)
    assert {name: int(size) for name, size in zip(found, files.sizes, strict=True)} == {
        name: size for size, name in enumerate(names)
    }
    last = files.take(np.array([len(files) - 1]))
    assert (len(last), last.name(0), last.path(0)) == (1, found[-1], tmp_path / found[-1])


def test_a_single_file_is_a_source_too(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "b.py").write_text("b")
    assert listed(tmp_path / "a.py") == ["a.py"]


def test_links_are_followed_but_for_loops_which_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for file in (root / "a.py", elsewhere / "deep" / "c.py"):
        file.parent.mkdir(parents=True)
        file.write_text("a")
    (root / "b.py").symlink_to(root / "a.py")
    (root / "linked").symlink_to(elsewhere)
    assert listed(root) == ["a.py", "b.py", "linked/deep/c.py"]
    assert not caplog.records
    (root / "up").symlink_to(root)
    (elsewhere / "deep" / "back").symlink_to(elsewhere)
    (root / "itself.py").symlink_to(root / "itself.py")
    (root / "nowhere.py").symlink_to(root / "nothing")
    assert listed(root) == ["a.py", "b.py", "linked/deep/c.py"]
    assert sorted(record.getMessage() for record in caplog.records) == [
        "source 'notes': skipped 'itself.py': Too many levels of symbolic links",
        "source 'notes': skipped 'linked/deep/back': a symbolic link to a folder that it lies in",
        "source 'notes': skipped 'nowhere.py': No such file or directory",
        "source 'notes': skipped 'up': a symbolic link to a folder that it lies in",
    ]


def test_a_folder_that_cannot_be_listed_is_logged(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert set(listed(tree)) == {name for name in NAMES if "deep" not in name}
    assert "'notes': skipped folder 'src/deep/': Permission denied" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "nowhere"}, r"'notes'.*nowhere.*correct its path"),
        ({"glob": "*.md"}, r"'notes'.*\*\.md.*correct its glob"),
        ({"exclude": ("*",)}, r"'notes'.*not excluded by \['\*'\]"),
        ({"glob": "empty*"}, r"'notes': all 1 files .* are empty"),
    ],
)
def test_nothing_to_read_names_the_source_and_what_to_correct(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.txt").touch()
    settings = settings | {"path": str(tmp_path / settings.get("path", ""))}
    with pytest.raises(DataError, match=message):
        list_files(Source(name="notes", kind="files", **settings))
