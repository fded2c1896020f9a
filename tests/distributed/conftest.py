import pytest

from tests.support.runs import make_data


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a corpus and its tokenizer, which ranks find there."""
    path = tmp_path_factory.mktemp("runs")
    make_data(path).prepare_data()
    return path
