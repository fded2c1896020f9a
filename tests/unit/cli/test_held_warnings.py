"""What transformers logs is shown unless a verb fails, and at once after the verb asks for it."""

import io
import logging

import pytest

from app.cli.held_warnings import show_warnings, warnings_held

LOGGER = logging.getLogger("transformers")


@warnings_held()
def _fail() -> None:
    LOGGER.warning("first")
    raise ValueError("refused")


def test_words_are_shown_when_it_is_asked_or_all_goes_well_and_dropped_at_an_error(monkeypatch, caplog) -> None:
    handler = logging.StreamHandler(said := io.StringIO())
    caplog.set_level(logging.WARNING, logger=LOGGER.name)  # `benchmark` in an earlier test leaves errors alone
    monkeypatch.setattr(LOGGER, "handlers", [handler])
    with pytest.raises(ValueError, match="refused"):
        _fail()
    with warnings_held():
        LOGGER.warning("second")
        assert not said.getvalue()
    with warnings_held():
        LOGGER.warning("third")
        show_warnings()
        LOGGER.warning("fourth")
        assert said.getvalue() == "second\nthird\nfourth\n"
    assert LOGGER.handlers == [handler]
