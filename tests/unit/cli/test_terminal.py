"""What a user sees of a decoding: three kinds of text told apart, and statistics."""

import io
import sys

import pytest
from rich.console import Console
from rich.text import Text

from app.cli.terminal import BatchPrinter, plain_writer, styled_console, styled_writer, summary
from app.decoding.result import DecodingResult, Step
from tests.support.tokenizers import byte_level

TOKENIZER = byte_level()


def ids(text):
    return TOKENIZER(text)["input_ids"]


def lone(*pieces):
    return [TOKENIZER.convert_tokens_to_ids(piece) for piece in pieces]


def shown(steps, *, no_color=False):
    """What a terminal gets, as text with styles."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", no_color=no_color)
    printer = BatchPrinter(TOKENIZER, [ids("x")], styled_writer(console))
    for step in steps:
        printer(0, step)
    printer.close()
    live = console.file.getvalue().removesuffix("\n").partition("\n\n[without rejected drafts]\n")[0]
    return Text.from_ansi(live)


def parts(text):
    """(part of the text, its style), neighbours of one style put together."""
    whole: list[list] = []
    for span in text.spans:
        if whole and whole[-1][1:] == [span.start, str(span.style)]:
            whole[-1][1] = span.end
            whole[-1][0] += text.plain[span.start : span.end]
        else:
            whole.append([text.plain[span.start : span.end], span.end, str(span.style)])
    return [(part, style) for part, _, style in whole]


STEPS = [
    Step(ids("A")),
    Step(ids("xyz") + ids("!"), accepted=len(ids("xyz"))),
    Step(ids("ab") + ids("?"), accepted=len(ids("ab")), rejected=tuple(ids("\tno\n"))),
]


def test_accepted_own_and_rejected_tokens_are_told_apart():
    text = shown(STEPS)
    assert text.plain == "Axyz!ab⇥no↵?"
    assert parts(text) == [("xyz", "color(2)"), ("ab", "color(2)"), ("⇥no↵", "dim strike color(1)")]


def test_a_text_with_rejected_drafts_in_it_is_printed_again_without_them():
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    for titles, end in (((), "\n"), (("first",), "\n\n")):
        printer = BatchPrinter(TOKENIZER, [ids("x")], styled_writer(console), titles)
        for step in STEPS:
            printer(0, step)
        printer.close()
        assert console.file.getvalue().endswith(f"?\n\n[without rejected drafts]\nAxyz!ab?{end}")
    printer = BatchPrinter(TOKENIZER, [ids("x")], styled_writer(console))
    printer(0, STEPS[1])
    printer.close()
    assert console.file.getvalue().endswith("!\n")


def test_without_colour_they_still_are():
    text = shown(STEPS, no_color=True)
    assert parts(text) == [("xyz", "underline"), ("ab", "underline"), ("⇥no↵", "dim strike")]


def test_plain_text_holds_no_rejected_draft(capsys):
    printer = BatchPrinter(TOKENIZER, [ids("x")], plain_writer)
    for step in STEPS:
        printer(0, step)
    assert capsys.readouterr().out == "Axyz!ab?"  # at once, not at the end
    printer.close()
    assert capsys.readouterr().out == "\n"


def test_a_character_waits_for_its_bytes_and_has_the_style_of_the_token_that_completes_it():
    first, *between, last = lone("ð", "Ł", "ĺ", "Ĭ")  # the bytes of one character
    started_by_a_draft = [Step(ids("A")), Step([first, *between], accepted=2), Step([last])]
    assert parts(shown(started_by_a_draft)) == []
    assert shown(started_by_a_draft).plain == "A😊"
    completed_by_a_draft = [Step([*ids("A"), first]), Step([*between, last, *ids("B")], accepted=3)]
    assert parts(shown(completed_by_a_draft)) == [("😊", "color(2)")]
    never_completed = [Step(ids("A")), Step([first, *between])]
    assert shown(never_completed).plain == "A\N{REPLACEMENT CHARACTER}"


def test_rejected_bytes_do_not_spoil_the_character_that_waits():
    first, *between, last = lone("ð", "Ł", "ĺ", "Ĭ")
    steps = [Step([*ids("A"), first]), Step([*between, last], accepted=2, rejected=tuple(ids("zz")))]
    assert shown(steps).plain == "A\N{REPLACEMENT CHARACTER}zz😊"


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    styled_writer(console)("a\x1b[2Jb\x9b2J\x7f\n\tc", "own")
    assert console.file.getvalue() == "a␛[2Jb\N{REPLACEMENT CHARACTER}2J␡\n\tc"


def test_several_prompts_are_printed_in_their_order_when_all_are_there(capsys):
    printer = BatchPrinter(TOKENIZER, [ids("x"), ids("y")], plain_writer, ["[1/2] first", "[2/2] second"])
    printer(1, Step(ids("two")))
    printer(0, Step(ids("one")))
    assert capsys.readouterr().out == ""
    printer.close()
    assert capsys.readouterr().out == "[1/2] first\none\n\n[2/2] second\ntwo\n\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stdout", "environment", "styled"),
    [
        (Terminal(), {"TERM": "xterm-256color"}, True),
        (Terminal(), {"TERM": "xterm-256color", "NO_COLOR": "1"}, True),
        (Terminal(), {"TERM": "dumb"}, False),  # rejected drafts could not be told from text
        (io.StringIO(), {"TERM": "xterm-256color"}, False),
        (io.StringIO(), {"TERM": "xterm-256color", "FORCE_COLOR": "1"}, False),
    ],
)
def test_styles_are_for_terminals_that_have_them(monkeypatch, stdout, environment, styled):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stdout)
    console = styled_console()
    assert (console is not None) == styled
    assert console is None or console.no_color == ("NO_COLOR" in environment)


def result(steps, **fields):
    tokens = [0, *(token for step in steps for token in step.tokens)]
    times = {"seconds_prefill": 0.1, "seconds_decode": 2.0, "stop_reason": "eos"}
    return DecodingResult(tokens=tokens, steps=tuple(steps), **(times | fields))


def test_statistics_of_one_prompt_and_of_batches_that_share_their_time():
    one = result([Step([1, 2, 3], accepted=2, rejected=(9, 9))])
    assert summary([[one]]) == (
        "4 tokens, stopped by eos, 1.5 tokens/s after the first, 50.0% of 4 drafted tokens accepted,"
        " 3.00 tokens a round"
    )
    gave_up = result([Step([1])], stop_reason="stop", seconds_decode=0.5, fell_back_after=2)
    assert summary([[gave_up]]).endswith("drafting did not pay and was given up after 2 tokens")
    assert summary([[one, gave_up], [gave_up]]).startswith(
        "3 prompts, 8 tokens, 2 stopped by stop, 1 stopped by eos, 2.0 tokens/s after the first"  # 5 in 2 + 0.5 s
    )
    nothing = result([], stop_reason="interrupted", seconds_decode=0.0)
    assert summary([[nothing]]) == "1 token, interrupted"
