from pathlib import Path

import pytest

from tests.unit.datamodules.corpora import small_datamodule


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose tokenizer is trained once."""
    folder = tmp_path_factory.mktemp("corpus")
    small_datamodule(folder).prepare_data()
    return folder
