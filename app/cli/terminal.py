"""Shows new text on the terminal: accepted drafts, the full model's own tokens, and rejected drafts."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from transformers import PreTrainedTokenizerBase

from app.decoding.result import DecodingResult, RoundCounts, Step
from app.text.text_stream import TextStream
from app.words import counted

Kind = Literal["accepted", "own", "rejected", "again"]
Write = Callable[[str, Kind], None]

# The style with colours, and the style without them (NO_COLOR).
STYLES: dict[Kind, tuple[str, str]] = {
    "accepted": ("green", "underline"),
    "own": ("none", "none"),
    "rejected": ("red dim strike", "dim strike"),
    "again": ("none", "none"),  # the whole text without rejected drafts
}
_LEGEND: dict[Kind, str] = {
    "accepted": "drafted and accepted",
    "own": "the full model's own",
    "rejected": "drafted and rejected",
}
# Control characters are shown as pictures, since a model's text must not steer the terminal. C1 has no pictures.
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\N{SYMBOL FOR DELETE}"}
_VISIBLE |= dict.fromkeys(range(128, 160), "\N{REPLACEMENT CHARACTER}")
_ON_ONE_LINE = {ord("\n"): "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", ord("\t"): "\N{RIGHTWARDS ARROW TO BAR}"}


def styled_console(*, stderr: bool = False) -> Console | None:
    """Return a console on stdout or stderr, or None if that is no terminal with styles, where text stays plain."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.file.isatty() and console.color_system is not None else None


def styled_writer(console: Console) -> Write:
    """Return a function that writes text at once, in the style of its kind, and never wraps it."""
    styles = {kind: Style.parse(pair[console.no_color]) for kind, pair in STYLES.items()}

    def write(text: str, kind: Kind) -> None:
        visible = text.translate(_VISIBLE | _ON_ONE_LINE if kind == "rejected" else _VISIBLE)
        console.print(Segments([Segment(visible, styles[kind])]), end="", soft_wrap=True)  # a str would lose tabs

    return write


def plain_writer(text: str, kind: Kind) -> None:
    """Write settled text to stdout at once, as it is."""
    if kind not in ("rejected", "again"):
        print(text, end="", flush=True)


class BatchPrinter:
    """Prints the continuations of a batch: a single one as it comes, several in their order when all are there.

    Of several prompts, each has a title, which is printed above its text; a single prompt has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        write: Write,
        titles: Sequence[str] = (),
    ) -> None:
        self._write, self._titles = write, titles
        self._streams = [TextStream(tokenizer, prompt) for prompt in prompts]
        self._pieces: list[list[tuple[str, Kind]]] = [[] for _ in prompts]

    def __call__(self, index: int, step: Step) -> None:
        """Print or keep what a round adds to the continuation at `index`."""
        for piece in _pieces(self._streams[index], step):
            self._pieces[index].append(piece)
            if not self._titles and piece[0]:
                self._write(*piece)

    def close(self) -> None:
        """Print what is left. A text among which rejected drafts were printed is printed again without them."""
        for index, (pieces, stream) in enumerate(zip(self._pieces, self._streams, strict=True)):
            pieces.append((stream.rest(), "own"))
            if self._titles:
                self._write(f"{self._titles[index]}\n", "own")
            for piece in pieces if self._titles else pieces[-1:]:
                self._write(*piece)
            if any(kind == "rejected" for _, kind in pieces):
                clean = "".join(text for text, kind in pieces if kind != "rejected")
                self._write(f"\n\n[without rejected drafts]\n{clean}", "again")
            self._write("\n\n" if self._titles else "\n", "own")


def _pieces(stream: TextStream, step: Step) -> Iterator[tuple[str, Kind]]:
    """Yield the pieces of text of a round. A character is of the kind of the token that completes it."""
    for index, token in enumerate(step.tokens):
        if index == step.accepted and step.rejected:  # drafted before the full model's token
            yield stream.preview(step.rejected), "rejected"
        yield stream.push(token), "accepted" if index < step.accepted else "own"


def print_statistics(label: str, batches: Sequence[Sequence[DecodingResult]], *, console: Console | None) -> None:
    """Print a line of statistics on stderr and, if `console` has styles, a line that says what they mean."""
    print(f"[{label}] {summary(batches)}", file=sys.stderr)
    if console is not None and any(result.drafted for batch in batches for result in batch):
        write = styled_writer(console)
        for kind, meaning in _LEGEND.items():
            write(meaning, kind)
            write("\n" if kind == "rejected" else "  ", "own")


def summary(batches: Sequence[Sequence[DecodingResult]]) -> str:
    """Write one line of statistics over all results. The results of a batch share their time."""
    results = [result for batch in batches for result in batch]
    stops = Counter(result.stop_reason for result in results)
    counts = RoundCounts.total(results)
    seconds = sum(max(result.seconds_decode for result in batch) for batch in batches)
    parts = [counted(sum(result.num_tokens for result in results), "token")]
    if len(results) > 1:
        parts.insert(0, f"{len(results)} prompts")
    for reason, count in stops.most_common():
        end = reason if reason == "interrupted" else f"stopped by {reason}"
        parts.append(end if len(results) == 1 else f"{count} {end}")
    if counts.num_decoded:
        parts.append(f"{counts.num_decoded / seconds:.1f} tokens/s after the first")
    if counts.drafted:
        parts.append(f"{counts.acceptance_rate:.1%} of {counts.drafted} drafted tokens accepted")
        if found := counts.drafted_by_n_gram:
            parts[-1] += f" (by n-grams {counts.accepted_by_n_gram / found:.1%} of {found})"
        parts.append(f"{counts.mean_tokens_per_round:.2f} tokens a round")
    if gave_up := [result.fell_back_after for result in results if result.fell_back_after is not None]:
        where = f"after {gave_up[0]} tokens" if len(results) == 1 else f"for {len(gave_up)} prompts"
        parts.append(f"drafting did not pay and was given up {where}")
    return ", ".join(parts)
