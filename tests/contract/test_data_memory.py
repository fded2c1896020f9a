"""`make bench-memory`: corpora of several sizes, a process for each, a ratio, a table and a file."""

import json
import sys
from pathlib import Path

import pytest

from app.cli import data_memory

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def test_shards_hold_the_bytes_asked_for_in_documents_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(data_memory, "_SHARD_BYTES", 100_000)
    documents = data_memory.write_shards(tmp_path, num_bytes=250_000)
    documents += data_memory.write_shards(tmp_path, num_bytes=30_000)
    sizes = [file.stat().st_size for file in sorted(tmp_path.iterdir())]
    assert [size // 10_000 for size in sizes] == [10, 10, 4 if sizes[2] < 50_000 else 5, 3]
    lines = [json.loads(line)["text"] for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
    assert len(lines) == documents == len(set(lines))
    assert len(lines) == pytest.approx(280_000 / 3000, rel=0.5)


@pytest.fixture
def peaks(monkeypatch):
    """Peak memory that the measured processes will report; the sizes of their corpora, and their commands."""
    peaks, seen = [], []

    def run_verb(*arguments):
        options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument)
        source = json.loads(options["data.sources"])["corpus"]
        size = sum(file.stat().st_size for file in Path(source["path"]).iterdir())
        seen.append((source["kind"], size, arguments))
        sources = {"corpus": {"tokens": 4096}}
        found = {"sources": sources, "tokens_per_second": 5e5, "peak_memory_mib": peaks[len(seen) - 1]}
        return f"command {len(seen)}", json.dumps(found)

    monkeypatch.setattr(data_memory, "run_verb", run_verb)
    return peaks, seen


@pytest.mark.parametrize(
    ("reported", "ratio", "verdict"), [([500, 520, 510], 1.04, "passed"), ([560, 500, 500], 1.12, "missed")]
)
def test_the_greatest_peak_is_compared_with_the_least(peaks, tmp_path, capsys, reported, ratio, verdict):
    values, seen = peaks
    values += reported
    output = tmp_path / "build" / "memory.json"
    data_memory.measure_data_memory(megabytes=(0.05, 0.1, 0.4), num_batches=3, output=str(output), config=CONFIG)
    assert [(kind, round(size / 1e6, 2)) for kind, size, _ in seen] == [
        ("jsonl", pytest.approx(s, abs=0.03)) for s in (0.05, 0.1, 0.4)
    ]
    found = json.loads(output.read_text())
    assert set(found["data_memory_ratio"]) == {"value", "target", "passed", "command", "environment"}
    assert "data_memory '--megabytes=[0.05, 0.1, 0.4]' --num_batches=3" in found["data_memory_ratio"]["command"]
    assert found["data_memory_ratio"]["value"] == pytest.approx(ratio)
    assert found["data_memory_ratio"]["passed"] == (verdict == "passed")
    assert [figures["peak_memory_mib"] for figures in found["measured"]] == reported
    assert [figures["documents"] for figures in found["measured"]] == sorted(
        {f["documents"] for f in found["measured"]}
    )
    out = capsys.readouterr().out
    assert f"data_memory_ratio: {ratio:.3f}, target at most 1.10: {verdict}" in out
    assert f"{max(reported)}" in out
    path = json.loads(dict(a.split("=", 1) for a in seen[0][2] if "=" in a)["--data.sources"])["corpus"]["path"]
    assert not Path(path).exists()


def test_the_verb_that_is_measured_takes_these_options(tmp_path, capsys):
    """One process for real: what `layerskip data` is asked for is what it understands, and what it says is read."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    data_memory.write_shards(corpus, num_bytes=300_000)
    _, printed = data_memory.run_verb("data", *data_memory._options(corpus, config=CONFIG, num_batches=2))
    figures = data_memory._figures(json.loads(printed))
    assert figures["tokens"] == 2 * 8 * 512
    assert figures["peak_memory_mib"] > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--megabytes", "[10]"], "megabytes: got (10.0,), allowed two or more sizes above 0, ascending"),
        (["--megabytes", "[10, 10]"], "megabytes: got (10.0, 10.0), allowed two"),
        (["--megabytes", "[0, 10]"], "megabytes: got (0.0, 10.0), allowed two"),
        (["--num_batches", "0"], "num_batches: got 0, allowed [1, inf)"),
        (["--num_batches", "x"], "num_batches: got x, allowed int (a whole number)"),
    ],
)
def test_a_mistake_is_told_in_one_message_before_anything_is_written(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data_memory", *options])
    with pytest.raises(SystemExit) as stop:
        data_memory.run()
    assert stop.value.code == 2
    assert f"error: {message}" in (err := capsys.readouterr().err)
    assert err.endswith("(options: python -m app.cli.data_memory --help)\n")
    assert not list(tmp_path.iterdir())
