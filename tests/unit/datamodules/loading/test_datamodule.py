import tempfile

import pytest

from app.errors import ConfigError
from datamodules.loading.datamodule import check_workers


def test_data_workers_are_refused_a_temporary_folder_too_long_for_their_sockets(monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/" + "t" * 74)
    check_workers(2)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/" + "t" * 75)
    check_workers(0)
    with pytest.raises(ConfigError, match=r"TMPDIR: got .* allowed at most 75 bytes"):
        check_workers(2)
