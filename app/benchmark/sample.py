"""Show what self-speculative decoding wrote: which tokens were drafted, and what the full model made of them."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from app.decoding.result import DecodingResult
from app.tables import Table
from app.words import counted

Kind = Literal["prompt", "accepted", "rejected", "full model"]

_COLOURS: dict[Kind, str] = {
    "prompt": "#757575",
    "accepted": "#1b7f37",
    "rejected": "#c62828",
    "full model": "#0d47a1",
}
_COLUMNS, _MOST_LINES = 52, 26
_MOST_OF_PROMPT = 2 * _COLUMNS  # characters
# At 100 dots an inch a character is 7 dots wide. The width must be whole, since text is drawn in whole dots.
_FONT = FontProperties(family="monospace", size=7 / 0.602 * 0.72)
_COLUMN_INCHES, _LINE_INCHES = 0.07, 0.17


class Piece(NamedTuple):
    """A stretch of text whose tokens have the same origin."""

    text: str
    kind: Kind


def pieces(prompt: Sequence[int], result: DecodingResult, decode: Callable[[list[int]], str]) -> list[Piece]:
    """Tell the origin of each part of a text decoded alone; rejected drafts stand before what replaced them."""
    tokens = list(prompt)
    found = [Piece(decode(tokens), "prompt")]

    def add(new: Sequence[int], kind: Kind, *, kept: bool = True) -> None:
        if new:  # the text that the tokens add, since a tokenizer may write a token alone differently
            found.append(Piece(decode([*tokens, *new])[len(decode(tokens)) :], kind))
        if kept:
            tokens.extend(new)

    add(result.tokens[:1], "full model")
    for step in result.steps:
        room = len(prompt) + len(result.tokens) - len(tokens)  # a last round may go beyond the end of the text
        add(step.tokens[: step.accepted][:room], "accepted")
        add(step.rejected, "rejected", kept=False)
        add(step.tokens[step.accepted :][: max(0, room - step.accepted)], "full model")
    return found


def round_table(found: Sequence[Piece]) -> Table:
    """Make one row a round of drafting and verification, after one of the token that the prompt's own pass yields."""
    title = "Rounds of self-speculative decoding"
    rows: list[tuple[str, ...]] = []
    row = {"accepted": "", "rejected": ""}
    for piece in found[1:]:
        row[piece.kind] = _code(piece.text)
        if piece.kind == "full model":
            rows.append((row["accepted"], row["rejected"], row["full model"]))
            row = {"accepted": "", "rejected": ""}
    if any(row.values()):  # the text ended among the drafts
        rows.append((row["accepted"], row["rejected"], ""))
    return Table(title, ("drafts accepted", "drafts rejected", "token of the full model"), rows)


def sample_figure(found: Sequence[Piece], *, title: str) -> Figure:
    """Draw the text in the colours of its tokens' origins; rejected drafts are struck through, accepted underlined."""
    lines = _lines([Piece(_end(found[0].text), "prompt"), *found[1:]])[:_MOST_LINES]
    figure = Figure(figsize=((_COLUMNS + 2) * _COLUMN_INCHES, (len(lines) + 3.5) * _LINE_INCHES))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1, _COLUMNS + 1), ylim=(len(lines) + 0.5, -3))
    axes.axis("off")
    legend = [Piece("accepted", "accepted"), Piece("rejected", "rejected"), Piece("full model", "full model")]
    axes.text(0, -2, title, fontproperties=_FONT, weight="bold", va="center", parse_math=False)
    head = [part for piece in legend for part in (piece, Piece("   ", "prompt"))]
    for row, line in enumerate([[*head, Piece("prompt", "prompt")], [], *lines], start=-1):
        column = 0
        for text, kind in line:
            colour, end = _COLOURS[kind], column + len(text)
            axes.text(column, row, text, fontproperties=_FONT, color=colour, va="center", parse_math=False)
            if kind in ("accepted", "rejected"):
                height = row if kind == "rejected" else row + 0.42
                axes.plot((column, end), (height, height), color=colour, linewidth=0.8)
            column = end
    return figure


def _end(text: str) -> str:
    return text if len(text) <= _MOST_OF_PROMPT else f"…{text[-_MOST_OF_PROMPT:]}"


def _lines(found: Sequence[Piece]) -> list[list[Piece]]:
    """Break the text at its own line ends, which are shown, and where a line is full."""
    lines: list[list[Piece]] = [[]]
    room = _COLUMNS
    for text, kind in found:
        for idx, part in enumerate(drawable(text.expandtabs(4), _FONT).split("\n")):
            if idx:
                lines.append([])
                room = _COLUMNS
            shown = part + ("⏎" if idx < text.count("\n") and kind != "prompt" else "")
            while shown:
                if not room:
                    lines.append([])
                    room = _COLUMNS
                lines[-1].append(Piece(shown[:room], kind))
                shown, room = shown[room:], room - len(lines[-1][-1].text)
    return lines


def drawable(text: str, font: FontProperties) -> str:
    """Put a box for each character that the font lacks; line breaks stay."""
    known = get_font(findfont(font)).get_charmap()
    return "".join(each if each == "\n" or ord(each) in known else "\N{WHITE SQUARE}" for each in text)


def _code(text: str) -> str:
    shown = text.replace("\n", "⏎").replace("`", "'").replace("|", r"\|")
    return f"`{shown}`" if shown.strip() else f"`{shown}` ({counted(len(shown), 'space')})" if shown else ""
