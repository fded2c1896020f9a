"""The token ids that drafts are chosen from: counted in texts, stored beside a model, read from SGLang's token maps.

A draft's head then has V' rows for V, which is most of a draft's cost in small models. Tokens outside are never
drafted; verification still may choose them, so that the output stays the full model's.
"""

import json
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.errors import CheckpointError, DataError, check_range, shortened
from app.whole_file import write_whole

DRAFT_VOCABULARY_FILE = "draft_vocabulary.json"
USUAL_PART = 8  # V / V'
_KEY = "token_ids"


def token_counts(texts: Iterable[str], tokenizer: Any) -> Counter[int]:
    """Count the token ids of texts, without those that the tokenizer puts around a text."""
    counts = Counter[int]()
    for text in texts:
        counts.update(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return counts


def usual_size(vocab_size: int, ends: Sequence[int]) -> int:
    """Return V' where nobody chose it: an eighth of V, but at least one id and all `ends` of a text."""
    return max(1, len(ends), vocab_size // USUAL_PART)


def ranked(counts: Mapping[int, int], *, vocab_size: int, ends: Sequence[int]) -> list[int]:
    """Rank all V token ids by their counts in texts, after `ends`; of equally frequent ones the lower id is first."""
    others = [token for token in range(vocab_size) if token not in ends]
    others.sort(key=lambda token: -counts.get(token, 0))
    return [*ends, *others]


def draft_vocabulary_file(token_ids: Sequence[int]) -> bytes:
    """The content of a file of these ids, the most useful ones first."""
    return json.dumps({_KEY: list(token_ids)}).encode()


def write_draft_vocabulary(directory: Path, token_ids: Sequence[int]) -> Path:
    """Store the ids beside the model in a directory, all of them or nothing; CheckpointError if that fails."""
    file = directory / DRAFT_VOCABULARY_FILE
    try:
        write_whole(file, draft_vocabulary_file(token_ids))
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error}") from error
    return file


def read_draft_vocabulary(file: Path, *, vocab_size: int, ends: Sequence[int]) -> list[int]:
    """The ids in a file: JSON of ours, a JSON list, or the token map of SGLang, a .pt file with a list or tensor.

    They come in the file's order, but for `ends`, which come first: so each prefix of at least these is a vocabulary.
    DataError if the file cannot be read, or holds something else, ids twice or outside the model's vocabulary, or lacks
    one of the ids that end a text.
    """
    try:
        stored = torch.load(file, weights_only=True) if file.suffix == ".pt" else json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, RecursionError) as error:
        raise DataError(f"{file}: no list of token ids can be read from it ({shortened(error)})") from error
    ids = stored.get(_KEY) if isinstance(stored, dict) else stored
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise DataError(f"{file}: allowed a list of token ids, or an object with one as {_KEY!r}")
    found = [
        *(
            f"id {token} is not below {vocab_size}, the vocabulary's size"
            for token in ids
            if not 0 <= token < vocab_size
        ),
        *(f"id {token} stands {count} times" for token, count in Counter(ids).items() if count > 1),
        *(f"id {token}, which ends a text, is not among its ids" for token in ends if token not in ids),
    ]
    if found:
        raise DataError(f"{file}: {found[0]}; make it anew for this model, or remove it")
    return [*ends, *(token for token in ids if token not in ends)]


def first_ids(token_ids: Sequence[int], size: int, *, ends: Sequence[int]) -> Sequence[int]:
    """Return the first `size` ids of a list that begins with `ends`; ConfigError if it is shorter, or ends are cut."""
    fix = f"run layerskip tune again, or make {DRAFT_VOCABULARY_FILE} anew"
    check_range("draft_vocabulary_size", size, low=max(1, len(ends)), high=len(token_ids), fix=fix)
    return token_ids[:size]
