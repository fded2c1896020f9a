"""Fixed prompts from held-out documents, for watching decoding while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice, zip_longest

from datamodules.packing import PackedRows

_ROOM = 16  # tokens a document should have beyond its prompt, so that there is something to continue


def held_out_prompts(sources: Sequence[PackedRows], *, count: int, length: int) -> list[list[int]]:
    """Beginnings of held-out documents, alternating between sources; the same for the same rows.

    Documents with room to continue come first; the longest of the others follow, with shorter prompts.

    Args:
        sources: The held-out rows of each source.
        count: How many prompts to return; fewer if there are fewer documents.
        length: Token ids in a prompt, >= 1.
    """
    by_source = [_prompts(rows, length=length) for rows in sources]
    alternating = chain.from_iterable(zip_longest(*by_source))
    return list(islice((prompt for prompt in alternating if prompt is not None), count))


def _prompts(rows: PackedRows, *, length: int) -> list[list[int]]:
    documents = [rows.document(index) for index in range(rows.num_documents)]
    documents.sort(key=lambda document: -min(len(document), length + _ROOM))  # stable: long ones keep their order
    return [document[: max(1, min(length, len(document) - _ROOM))].tolist() for document in documents]
