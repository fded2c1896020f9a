from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

import pytest

from app.errors import ConfigError, DataError
from datamodules.sources import _KINDS, Document, Source, SourceKind, fingerprint, read_documents, read_files


def folder_source(folder: Path, **settings: str) -> Source:
    return Source(name="notes", kind="files", path=str(folder), **settings)  # type: ignore[arg-type]


def test_table_has_every_kind() -> None:
    assert set(_KINDS) == set(get_args(SourceKind))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"name": "a", "kind": "web"}, "kind"),
        ({"name": "a", "kind": "stdlib_code", "weight": 0.0}, "weight"),
        ({"name": "a", "kind": "stdlib_code", "weight": float("nan")}, "weight"),
        ({"name": "a", "kind": "stdlib_code", "weight": float("inf")}, "weight"),
        ({"name": "a", "kind": "files"}, "path"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_at_once(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Source(**settings)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_path_without_effect_warns(caplog: pytest.LogCaptureFixture) -> None:
    Source(name="a", kind="stdlib_code", path="/somewhere")
    assert "no effect" in caplog.text


def test_files_are_sorted_and_chosen_by_glob(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.md", "a.md", "sub/c.md", "skipped.txt"):
        (tmp_path / name).write_text(name)
    assert [file.name for file in read_files(folder_source(tmp_path, glob="**/*.md"))] == ["a.md", "b.md", "sub/c.md"]


def test_missing_folder_names_source_and_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'notes'.*nowhere.*correct"):
        read_files(folder_source(tmp_path / "nowhere"))


def test_no_matching_file_names_source_path_and_glob(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=rf"'notes'.*{tmp_path.name}.*\*\.md.*correct"):
        read_files(folder_source(tmp_path, glob="*.md"))


def test_only_empty_files_name_source_and_path(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    source = folder_source(tmp_path)
    with pytest.raises(DataError, match=rf"'notes'.*{tmp_path.name}.*no document left.*\n.*a\.txt: empty"):
        read_documents(source, read_files(source), max_bad_share=1.0)


def test_bad_files_are_skipped_and_logged_with_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for index in range(8):
        (tmp_path / f"{index}.txt").write_text(f"text {index}")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "nothing.txt").write_bytes(b"")
    source = folder_source(tmp_path)
    documents = read_documents(source, read_files(source), max_bad_share=0.2)
    assert [document.text for document in documents] == [f"text {index}" for index in range(8)]
    assert "latin.txt: not UTF-8 at byte 3" in caplog.text
    assert "nothing.txt: empty" in caplog.text
    assert "2 of 10 files skipped" in caplog.text
    with pytest.raises(DataError, match=r"'notes'.*max_bad_share 0\.19.*2 of 10[^$]*latin\.txt: not UTF-8 at byte 3"):
        read_documents(source, read_files(source), max_bad_share=0.19)


def test_fingerprint_depends_on_names_and_contents(tmp_path: Path) -> None:
    source = folder_source(tmp_path)
    seen = set()
    for name, content in (("a", "1"), ("a", "2"), ("b", "2")):
        for file in tmp_path.iterdir():
            file.unlink()
        (tmp_path / name).write_text(content)
        seen.add(fingerprint(read_files(source)))
        assert fingerprint(read_files(source)) in seen
    assert len(seen) == 3


def test_about_the_asked_share_is_held_out_by_content_alone() -> None:
    texts = [f"document {index}" for index in range(2000)]
    sides = [Document("here", text, origin=text).is_held_out(share=0.05) for text in texts]
    assert 60 <= sum(sides) <= 140
    assert sides == [Document("elsewhere", text, origin=text).is_held_out(share=0.05) for text in texts]


def test_a_library_gives_code_and_prose_whose_side_follows_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prose = "What this does is told at some length here, so that it counts as prose." + " Twice." * 3
    module = f'"""{prose}"""\n\ndef shout():\n    """Too short."""\n'
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'assert': 'The assert statement', 'if': 'An if'}")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_loud.py").write_text("assert True")
    (tmp_path / "loud.py").write_text(module)
    monkeypatch.setattr("sysconfig.get_path", lambda _name: str(tmp_path))

    code_source, text_source = Source(name="code", kind="stdlib_code"), Source(name="text", kind="stdlib_text")
    code = read_documents(code_source, read_files(code_source), max_bad_share=0)
    text = read_documents(text_source, read_files(text_source), max_bad_share=0)
    assert code == [Document("loud.py", module, origin=module)]
    assert text[0] == Document("loud.py", f"loud\n\n{prose}\n", origin=module)
    assert [document.text for document in text[1:]] == ["The assert statement", "An if"]


def test_the_real_standard_library_is_listed() -> None:
    names = {file.name for file in read_files(Source(name="code", kind="stdlib_code"))}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not any(part in name.split("/") for name in names for part in ("test", "site-packages", "idle_test"))
