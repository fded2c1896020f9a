"""`layerskip vocabulary`: the token ids that drafts are chosen from. Tested by tests/contract/test_vocabulary.py."""

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from app.checkpoints.weights import is_trained_weights
from app.cli.tables import print_table
from app.errors import ConfigError, DataError, check_range
from app.model_files.decoding_defaults import DEFAULTS_FIELD, parse_decoding_defaults, write_decoding_defaults
from app.model_files.draft_vocabulary import ranked, token_counts, usual_size, write_draft_vocabulary
from app.model_files.generation_config import read_generation_config, stored_generation_config
from app.model_files.open import load_config, open_tokenizer
from app.tables import Table
from app.text.text_tokens import end_token_ids
from app.text.tokenizer_files import check_fits
from app.words import counted
from datamodules.readers import open_reader
from datamodules.readers.records import BadRecord, Document
from datamodules.readers.sources import Source

_log = logging.getLogger(__name__)

_PARTS_SHOWN = (16, 8, 4)


def vocabulary(*, model: str, texts: str, field: str = "text", size: int | None = None) -> None:
    """Let a model draft only the most frequent token ids of your texts, which makes a draft cheaper.

    The list is stored as draft_vocabulary.json in the model's directory, the ids that end a text first and the others
    by frequency. Drafts are then chosen from it. The output stays the full model's, which may still choose every token.
    layerskip tune finds out whether the list pays, and whether a half or a quarter of it does.

    Args:
        model: Hugging Face directory, to which the list is written.
        texts: JSON lines file; each line is an object with a text. Take texts like those that the model will write,
            best its own, which layerskip write makes.
        field: Name of the JSON field that holds the text; a.b for b inside of a.
        size: Number of token ids in the list; by default an eighth of the model's vocabulary.
    """
    directory = Path(model)
    if not directory.is_dir() or is_trained_weights(model) or not os.access(directory, os.W_OK):
        fix = "layerskip export makes one of any model"
        raise ConfigError("model", got=model, allowed="a Hugging Face directory that can be written to", fix=fix)
    config, tokenizer = load_config(model, field="model"), open_tokenizer(model, field="model")
    vocab_size = config.get_text_config().vocab_size
    check_fits(tokenizer, vocab_size=vocab_size, field="model", got=model)
    ends = end_token_ids(stored_generation_config(directory, config), tokenizer)
    stored = read_generation_config(directory).get(DEFAULTS_FIELD)
    tuned = None if stored is None else parse_decoding_defaults(stored, config)
    fewest = max(1, len(ends))
    size = usual_size(vocab_size, ends) if size is None else size
    check_range("size", size, low=fewest, high=vocab_size)
    counts = token_counts(_texts(texts, field), tokenizer)
    token_ids, total = ranked(counts, vocab_size=vocab_size, ends=ends), max(1, counts.total())
    if tuned is not None and tuned.draft_vocabulary_size is not None:
        _log.info(
            "layerskip tune's choice of %d token ids is for another list and is forgotten", tuned.draft_vocabulary_size
        )
        write_decoding_defaults(
            directory, replace(tuned, draft_vocabulary_size=None, draft_head=None, measured_speedup=None)
        )
    file = write_draft_vocabulary(directory, token_ids[:size])
    sizes = sorted({size, *(max(fewest, vocab_size // part) for part in _PARTS_SHOWN)})
    shares = [sum(counts[token] for token in token_ids[:each]) / total for each in sizes]
    print_table(
        Table.of_columns(
            f"What the most frequent of {vocab_size} token ids hold of {counted(total, 'token')}",
            {
                "token ids": [f"{each}{' (stored)' * (each == size)}" for each in sizes],
                "of all ids": [f"{each / vocab_size:.1%}" for each in sizes],
                "share of the tokens": [f"{share:.2%}" for share in shares],
            },
        )
    )
    print(
        f"{file}: {size} token ids; layerskip tune --model {model} finds how many of them drafts are best chosen from"
    )


def _texts(path: str, field: str) -> Iterator[str]:
    """Yield the texts of a file, and warn of rows that have none; DataError where no row has one."""
    reader = open_reader(Source(kind="jsonl", path=path, field=field, name="texts"), min_chunks=1)
    found, bad = 0, list[BadRecord]()
    for chunk in range(reader.num_chunks):
        for record in reader.read(chunk):
            if isinstance(record, Document):
                found += 1
                yield record.text
            elif not record.is_empty:
                bad.append(record)
    if not found:
        why = f"; {bad[0].location}: {bad[0].reason}" if bad else ""
        raise DataError(f"texts: {path} holds no text in the field {field!r}{why}")
    if bad:
        _log.warning("%s: %s skipped; %s: %s", path, counted(len(bad), "row"), bad[0].location, bad[0].reason)
