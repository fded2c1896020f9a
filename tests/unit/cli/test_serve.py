import importlib.util

import pytest

from app.cli.serve import serve
from app.errors import ConfigError
from app.generation.loaded_model import DraftLoadOptions


def test_without_its_extra_the_verb_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'no package starlette.*pip install "layerskip-lightning\[serve\]"'):
        serve(model="any", loading=DraftLoadOptions())
