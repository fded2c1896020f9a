"""`layerskip write`: a model writes text to train its exits on. Tested by tests/contract/test_write.py."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from app.cli.adapt_settings import check_prompts_or_corpus, names_corpus
from app.errors import ConfigError, DataError, check_output_file, check_range
from app.generation.loaded_model import LoadedModel, LoadOptions
from app.generation.options import GenerationOptions
from app.generation.own_text import OwnText
from app.generation.prompts import read_prompts
from app.text.text_tokens import prompt_tokens as encode
from app.words import counted
from datamodules.readers import open_reader
from datamodules.readers.records import Document
from datamodules.readers.sources import Source, SourceKind

_CHARACTERS_A_TOKEN = 12  # more than a token takes, so that a prompt is long enough


def write(
    *,
    model: str,
    output: str,
    prompts: str | None = None,
    corpus: str | None = None,
    corpus_kind: SourceKind = "files",
    glob: str | None = None,
    num_prompts: int = 256,
    prompt_length: int = 48,
    held_out_share: float = 0.05,
    temperatures: list[float] = [0.0, 0.7],  # noqa: B006  # it is not changed, and the help shows it
    batch_size: int = 8,
    time_limit_seconds: float = float("inf"),
    loading: LoadOptions,
    **options: Any,
) -> None:
    """Let a model continue prompts, and write the texts as JSON lines to train on, resumably.

    Train on them with a source of kind jsonl, alone or mixed with a corpus by weight. A second call with the same
    options goes on where the first was interrupted.

    Args:
        model: Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf file.
        output: JSON lines file to write; each line has "text", the prompt and its continuation.
        prompts: JSON lines file of prompts; each line is an object with a string "prompt".
        corpus: Folder or file instead, from whose documents prompts are cut at the beginnings of lines.
        corpus_kind: How the corpus is read; see datamodules/README.md. stdlib_code and stdlib_text need no corpus.
        glob: Pattern of the corpus's files.
        num_prompts: Prompts to take, at most.
        prompt_length: Tokens of a prompt from a corpus.
        held_out_share: Share of the corpus's documents left out: those that a datamodule of this validation_share has.
        temperatures: Each prompt is continued once at each of them; 0 is greedy.
        batch_size: Number of prompts that are decoded together.
        time_limit_seconds: No batch is begun after this.
        loading: See LoadOptions.
        options: See GenerationOptions.
    """
    file = check_output_file(output)
    if file.exists() and not file.is_file():
        raise ConfigError("output", got=output, allowed="a file, which a second call can go on with")
    check_range("num_prompts", num_prompts, low=1)
    check_range("prompt_length", prompt_length, low=1)
    check_prompts_or_corpus(prompts, has_corpus=names_corpus(corpus, corpus_kind))
    chosen = GenerationOptions(**options)
    if chosen.strategy is None:  # batches gain little from drafts
        chosen = replace(chosen, strategy="autoregressive")
    for temperature in temperatures:
        GenerationOptions(temperature=temperature)
    if prompts is not None:
        documents = read_prompts(prompts, limit=num_prompts)
    else:
        source = Source(kind=corpus_kind, path=corpus, glob=glob, name="corpus")
        documents = _openings(source, num_prompts, prompt_length, held_out_share=held_out_share, seed=chosen.seed)
    loaded = loading.load(model)
    texts = documents if prompts is not None else _cut(documents, loaded, prompt_length)
    own = OwnText(texts=texts, options=chosen, temperatures=temperatures, batch_size=batch_size)
    count = own.write(loaded, file, time_limit_seconds=time_limit_seconds)
    print(f"{output}: {counted(count, 'token')} written now")


def _openings(source: Source, count: int, length: int, *, held_out_share: float, seed: int) -> list[str]:
    """Cut pieces of documents that are not held out, each from the beginning of a line on, in a random order."""
    reader, rng = open_reader(source, min_chunks=1), random.Random(seed)
    size, found = length * _CHARACTERS_A_TOKEN, list[str]()
    chunks = list(range(reader.num_chunks))
    rng.shuffle(chunks)
    for chunk in chunks:
        for record in reader.read(chunk):
            if not isinstance(record, Document) or record.is_held_out(share=held_out_share):
                continue
            for _ in range(1 + len(record.text) // (8 * size)):
                start = record.text.rfind("\n", 0, rng.randrange(len(record.text))) + 1
                if (piece := record.text[start : start + size]).strip():
                    found.append(piece)
        if len(found) >= 4 * count:  # so that they are from several chunks
            break
    if not found:
        raise DataError(f"corpus: no document could be read from {source.root}, or all are held out")
    return rng.sample(found, min(count, len(found)))


def _cut(pieces: Sequence[str], loaded: LoadedModel, length: int) -> list[str]:
    tokenizer = loaded.tokenizer
    ids = (encode(tokenizer, piece)[:length] for piece in pieces)
    return [text for each in ids if (text := tokenizer.decode(each, skip_special_tokens=True)).strip()]
