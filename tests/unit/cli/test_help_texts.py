"""What the shell completes from the help texts that jsonargparse writes."""

from app.cli.generate import generate
from app.cli.parsing.help_texts import options_in
from app.cli.parsing.verb_parser import parser_of
from app.decoding.strategies import STRATEGIES


def test_values_of_a_choice_that_may_be_none_are_found(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    options = options_in(parser_of(generate, "generate", {}).format_help())
    assert set(options["strategy"]) == {*STRATEGIES}
    assert options["exit_layer"] == ()
