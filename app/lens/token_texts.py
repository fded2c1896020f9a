"""Token ids as texts of one line in which every character can be seen, and short names of models."""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from app.text.text_stream import REPLACEMENT, continuation, is_byte
from app.words import model_name

_SPACES = {
    " ": "\N{OPEN BOX}",
    "\N{NO-BREAK SPACE}": "\N{SHOULDERED OPEN BOX}",
    "\t": "\N{RIGHTWARDS ARROW TO BAR}",
    "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
}


def visible(text: str) -> str:
    """Show what cannot be seen: spaces, tabs and line ends as signs, other invisible characters by their number."""
    return "".join(_SPACES.get(each) or (each if each.isprintable() else f"<U+{ord(each):04X}>") for each in text)


def token_texts(tokenizer: Any, before: Sequence[int], ids: Iterable[int]) -> dict[int, str]:
    """Return what each token id adds to a text, visibly; a special token or part of a character by its entry.

    Args:
        before: Token ids of some text, since a tokenizer may drop the space at the beginning of a text.
    """
    texts = {}
    for token in sorted(set(ids)):
        entry = tokenizer.convert_ids_to_tokens(token)
        text = "" if entry is None or is_byte(entry) else continuation(tokenizer, before, [token])
        texts[token] = visible((text if REPLACEMENT not in text else "") or entry or f"[{token}]")
    return texts


def short_names(paths: Sequence[str]) -> list[str]:
    """Return a name for each model: that of its path, or of two paths the parts in which they differ."""
    parts = [Path(path).parts or (path,) for path in paths]
    if len(set(parts)) == 1:
        return [(model_name(paths[0]) or paths[0]) + " again" * number for number in range(len(parts))]
    rests = [own[_shared(parts) :] or own[-1:] for own in parts]
    behind = _shared([rest[::-1] for rest in rests])
    return ["/".join(rest[: len(rest) - behind] or rest) for rest in rests]


def _shared(parts: Sequence[tuple[str, ...]]) -> int:
    """Count the first parts that all paths have in common; of one path, none."""
    return sum(1 for _ in takewhile(lambda each: len({*each}) == 1 < len(each), zip(*parts, strict=False)))
