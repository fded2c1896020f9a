"""`make bench-memory`: is the memory that streaming takes the same for a corpus of 10 MB and one of 2 GB?

JSONL corpora are written into a temporary folder, and `layerskip data` streams the same number of tokens from each, in
a process of its own that reports its peak resident memory.
"""

import json
import shlex
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from app.cli.tables import print_table
from app.errors import ConfigError, check_range
from app.tables import Table
from tests.bench.results import run_measurement, run_verb, target_result

THRESHOLD = 1.1  # greatest peak over least
_SHARD_BYTES = 50_000_000
_ROWS, _SEQ_LEN, _VOCAB_SIZE = 8, 512, 4096


def measure_data_memory(
    *,
    megabytes: tuple[float, ...] = (10, 200, 2000),
    num_batches: int = 768,
    output: str = "build/data_memory.json",
    config: str = "configs/quickstart.yaml",
) -> None:
    """Measure the peak memory of streaming corpora of several sizes.

    Args:
        megabytes: Sizes of the corpora in 10^6 bytes, ascending, two or more; the last is what the disk must have free.
        num_batches: Batches of 4,096 tokens to stream from each.
        output: The JSON object to write.
        config: The run whose settings count, but for sources and sizes.
    """
    if len(megabytes) < 2 or megabytes[0] <= 0 or any(small >= large for small, large in pairwise(megabytes)):
        raise ConfigError("megabytes", got=megabytes, allowed="two or more sizes above 0, ascending")
    check_range("num_batches", num_batches, low=1)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    measured: list[dict[str, Any]] = []
    documents = 0
    with TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for before, size in pairwise((0.0, *megabytes)):  # the corpus grows: the disk holds no more than the last one
            documents += write_shards(corpus, num_bytes=int((size - before) * 1e6))
            _, streamed = run_verb("data", *_options(corpus, config=config, num_batches=num_batches))
            measured.append({"megabytes": size, "documents": documents} | _figures(json.loads(streamed)))
    peaks = [figures["peak_memory_mib"] for figures in measured]
    options = [f"--megabytes={list(megabytes)}", f"--num_batches={num_batches}", f"--config={config}"]
    command = shlex.join(["python", "-m", "tests.bench.data_memory", *options])
    result = target_result(max(peaks) / min(peaks), THRESHOLD, command, at_most=True)
    Path(output).write_text(json.dumps({"data_memory_ratio": result, "measured": measured}, indent=2) + "\n", "utf-8")
    columns = ("corpus (MB)", "documents", "tokens streamed", "tokens/s", "peak memory (MiB)")
    rows = [tuple(f"{value:,.0f}" for value in figures.values()) for figures in measured]
    print_table(Table("Peak memory of `layerskip data`, by size of the corpus", columns, rows))
    verdict = "passed" if result["passed"] else "missed"
    print(f"data_memory_ratio: {result['value']:.3f}, target at most {THRESHOLD:.2f}: {verdict}")


def write_shards(folder: Path, *, num_bytes: int) -> int:
    """Add JSONL shards of `num_bytes` in all, and up to a line more; return the number of documents in them.

    Documents have 5 to 1,000 words of an invented language, of which some are frequent, as in a real one.
    """
    rng = np.random.default_rng(0)
    letters = np.array([letter.encode() for letter in "etaoinshrdlucmfwypvbgk"])
    words = np.array([b"".join(rng.choice(letters, size=size)) for size in rng.integers(2, 10, size=5000)])
    texts = [b" ".join(words[rng.zipf(1.3, size=size) % len(words)]) for size in rng.integers(5, 1001, size=2000)]
    written = documents = 0
    while written < num_bytes:
        number, size = len(list(folder.iterdir())), min(_SHARD_BYTES, num_bytes - written)
        with (folder / f"shard-{number:05}.jsonl").open("wb") as shard:
            while shard.tell() < size:
                text = texts[documents % len(texts)]
                shard.write(b'{"text": "%d %d %b"}\n' % (number, documents, text))  # no document twice
                documents += 1
            written += shard.tell()
    return documents


def _options(corpus: Path, *, config: str, num_batches: int) -> list[str]:
    sources = json.dumps({"corpus": {"kind": "jsonl", "path": str(corpus)}})
    return [
        *("--config", config, f"--data.sources={sources}", f"--data.cache_dir={corpus.parent / 'cache'}"),
        *(f"--data.seq_len={_SEQ_LEN}", f"--data.batch_size={_ROWS}", f"--data.vocab_size={_VOCAB_SIZE}"),
        f"--model.config.init_args.vocab_size={_VOCAB_SIZE}",  # as `fit` would ask for
        *("--num_batches", str(num_batches), "--json"),
    ]


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokens": found["sources"]["corpus"]["tokens"],
        "tokens_per_second": found["tokens_per_second"],
        "peak_memory_mib": found["peak_memory_mib"],
    }


if __name__ == "__main__":
    run_measurement(measure_data_memory, module="data_memory")
