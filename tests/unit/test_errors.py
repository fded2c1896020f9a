import pytest

from app import errors
from app.errors import ConfigError, check_output_file


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
