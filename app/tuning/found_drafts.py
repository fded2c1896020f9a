"""What n-grams would have drafted along the full model's own output, at every point of it."""

from collections.abc import Sequence
from typing import NamedTuple

from app.decoding.n_grams import NGramIndex


class FoundDraft(NamedTuple):
    """A draft of n-grams after some token of an output; both are 0 where nothing was found."""

    length: int
    kept: int  # tokens of it, counted from the first, that the output has


def found_drafts(prompt: Sequence[int], output: Sequence[int], *, match: int, most: int) -> list[FoundDraft]:
    """Return the drafts of at most `most` tokens after each token of the output but the last."""
    index, found = NGramIndex(prompt, match=match), []
    for settled in range(1, len(output)):
        index.extend(output[settled - 1 : settled])
        draft = index.draft(most)
        pairs = zip(draft, output[settled:], strict=False)
        kept = next((i for i, (token, wanted) in enumerate(pairs) if token != wanted), None)
        found.append(FoundDraft(len(draft), min(len(draft), len(output) - settled) if kept is None else kept))
    return found
