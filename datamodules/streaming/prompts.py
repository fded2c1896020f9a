"""Fixed prompts from held-out documents, for watching decoding while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice, zip_longest

from datamodules.streaming.packing import Tokens

_ROOM = 16  # tokens a document should have beyond its prompt, so that there is something to continue


def held_out_prompts(sources: Sequence[Sequence[Tokens]], *, count: int, length: int) -> list[list[int]]:
    """Beginnings of held-out documents, alternating between sources; the same for the same documents.

    Documents with room to continue come first; the longest of the others follow, with shorter prompts.

    Args:
        sources: The held-out documents of each source: token ids, the last one end-of-text.
        count: How many prompts to return; fewer if there are fewer documents.
        length: Token ids in a prompt, >= 1.
    """
    by_source = [_prompts(documents, length=length) for documents in sources]
    alternating = chain.from_iterable(zip_longest(*by_source))
    return list(islice((prompt for prompt in alternating if prompt is not None), count))


def _prompts(documents: Sequence[Tokens], *, length: int) -> list[list[int]]:
    texts = sorted((document[:-1] for document in documents), key=lambda text: -min(len(text), length + _ROOM))
    return [text[: max(1, min(length, len(text) - _ROOM))].tolist() for text in texts]  # long ones kept their order
