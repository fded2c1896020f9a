from pathlib import Path

import pytest

from app import errors
from app.errors import ConfigError, check_new, check_output_file


def test_a_file_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    assert check_output_file(str(tmp_path / "a.json"), suffix=".json") == tmp_path / "a.json"
    (tmp_path / "folder.json").mkdir()
    allowed = "allowed a .json file in a folder that exists and can be written to"
    for name, said in (("a.png", allowed), ("none/a.json", f"{allowed}; make "), ("folder.json", allowed)):
        with pytest.raises(ConfigError, match=said):
            check_output_file(str(tmp_path / name), suffix=".json")
    monkeypatch.setattr(errors.os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=allowed):
        check_output_file(str(tmp_path / "a.json"), suffix=".json")


def test_a_file_that_holds_something_is_new_to_no_verb(tmp_path):
    files = [tmp_path / name for name in ("a.json", "a.csv", "a.png")]
    check_new("a.json", files)
    files[1].touch()
    check_new("a.json", [*files, Path("/dev/null")])
    for file in files[1:]:
        file.write_text("mine")
    with pytest.raises(
        ConfigError, match=r"output: got 'a.json', allowed a new file; --overwrite true replaces a.csv, a.png"
    ):
        check_new("a.json", files)
