import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader, IterableDataset

from app.errors import DataError
from datamodules.readers.records import BadRecord, Reader
from tests.unit.datamodules.readers.reading import assert_any_start_reads_on, bad, open_path, read_all, texts

ROWS = [f"{shard} {row}" for shard in range(3) for row in range(50)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    for shard in range(3):
        rows = [row for row in ROWS if row.startswith(str(shard))]
        lines = [json.dumps({"text": row, "meta": {"url": row}, "id": 1}) + "\n" for row in rows]
        (tmp_path / f"{shard}.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize("min_chunks", [1, 3, 7])
def test_every_row_is_in_exactly_one_chunk(folder: Path, min_chunks: int, caplog: pytest.LogCaptureFixture) -> None:
    reader = open_path(folder, kind="hub", min_chunks=min_chunks)
    assert texts(reader) == sorted(ROWS)
    assert reader.num_chunks == {1: 3, 3: 3, 7: 9}[min_chunks]
    assert ("3 shard(s) for 7 lanes" in caplog.text) == (min_chunks == 7)
    assert_any_start_reads_on(reader)


class Chunks(IterableDataset[tuple[int, str]]):
    """Chunk c in worker c mod 2."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __iter__(self) -> Any:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        assert worker is not None
        for chunk in range(worker.id, self._reader.num_chunks, worker.num_workers):
            yield from ((worker.id, record.text) for record in self._reader.read(chunk))  # type: ignore[union-attr]


def test_a_worker_process_gets_the_chunks_it_asks_for(folder: Path) -> None:
    """`datasets` by itself would give each chunk to the first worker only."""
    reader = open_path(folder, kind="hub")
    found = list(DataLoader(Chunks(reader), batch_size=None, num_workers=2))
    assert sorted(text for _, text in found) == sorted(ROWS)
    assert {worker for worker, _ in found} == {0, 1}


def test_split_files_and_field_are_chosen(folder: Path) -> None:
    assert texts(open_path(folder, kind="hub", data_files=("1.jsonl",), field="meta.url")) == sorted(ROWS[50:100])


def test_bad_rows_are_reported_and_an_unreadable_shard_hides_no_other(folder: Path) -> None:
    (folder / "rows").mkdir()
    pq.write_table(pa.table({"text": ["good", None, " ", "x" * 101]}), folder / "rows" / "a.parquet")
    found = dict(bad(open_path(folder / "rows", kind="hub", max_document_megabytes=0.0001)))
    assert [location.rpartition(":")[2] for location in found] == [f"shard 1, record {row}" for row in (2, 3, 4)]
    assert [*found.values()] == [
        "field 'text' is NoneType, not text",
        "field 'text' is empty",
        "longer than 100 bytes",
    ]
    reader = open_path(folder, kind="hub", data_files=("*.jsonl",))
    with (folder / "1.jsonl").open("a") as file:
        file.write('{"text": broken\n')
    (folder / "2.jsonl").unlink()
    assert texts(reader) == sorted(ROWS[:50])
    assert [location.rpartition(":")[2] for location, _ in bad(reader)] == ["shard 2", "shard 3"]
    assert all(isinstance(record, BadRecord) for record in read_all(reader)[50:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"field": "body"}, r"'notes'.*no column 'body'; it has text, meta, id; correct field"),
        ({"split": "test"}, r"'notes'.*test.*check path, config_name, split"),
        ({"config_name": "en"}, r"'notes'.*'en' not found.*check path, config_name"),
        ({"data_files": ("none.jsonl",)}, r"'notes'.*none\.jsonl.*data_files"),
        ({"path": "nowhere"}, r"'notes'.*nowhere.*check path"),
    ],
)
def test_a_dataset_that_cannot_be_opened_says_why(folder: Path, settings: dict[str, Any], message: str) -> None:
    path = folder / settings.pop("path", "") if "path" in settings else folder
    with pytest.raises(DataError, match=message):
        open_path(path, kind="hub", **settings)


def test_a_hub_out_of_reach_is_an_error_with_reason_and_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **settings: Any) -> None:
        assert (args, settings) == (("some/set", "en"), {"data_files": None, "revision": "v1"})
        raise ConnectionError("Couldn't reach 'some/set' on the Hub") from OSError("no route")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(DataError, match=r"'notes'.*'some/set'.*Couldn't reach.*no route.*the network.*hf auth login"):
        open_path("some/set", kind="hub", config_name="en", revision="v1")


def test_what_is_read_of_a_folder_is_in_its_fingerprint(folder: Path) -> None:
    first = open_path(folder, kind="hub", data_files=("0.jsonl", "1.jsonl")).fingerprint
    rewritten = folder / "1.jsonl"
    (folder / "2.jsonl").write_text("")
    assert open_path(folder, kind="hub", data_files=("0.jsonl", "1.jsonl")).fingerprint == first
    rewritten.write_text(rewritten.read_text().replace("1 49", "1 94"))
    assert open_path(folder, kind="hub", data_files=("0.jsonl", "1.jsonl")).fingerprint != first
