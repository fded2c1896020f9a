import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.readers import FILE_READERS, open_reader
from datamodules.readers.files import list_files
from datamodules.readers.sources import Source, SourceKind
from tests.unit.datamodules.readers.reading import open_path, read_all

KINDS = get_args(SourceKind)


def corpus(folder: Path) -> Path:
    folder.mkdir()
    for index in range(6):
        rows = [f"{index} {row}" for row in range(20)]
        (folder / f"{index}.txt").write_text("\n".join(rows))
        (folder / f"{index}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        pq.write_table(pa.table({"text": rows}), folder / f"{index}.parquet", row_group_size=5)
    return folder


GLOBS = {"files": "*.txt", "lines": "*.txt", "jsonl": None, "parquet": None, "hub": None}


def source(kind: str, folder: Path) -> Source:
    if kind.startswith("stdlib"):
        return Source(name="notes", kind=kind)  # type: ignore[arg-type]
    files = ("*.jsonl",) if kind == "hub" else ()
    return Source(name="notes", kind=kind, path=str(folder), glob=GLOBS[kind], data_files=files)  # type: ignore[arg-type]


def test_every_kind_has_a_reader() -> None:
    assert {*FILE_READERS, "hub"} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_files_give_the_same_chunks_also_in_another_process(tmp_path: Path, kind: str) -> None:
    reader = open_reader(source(kind, corpus(tmp_path / "a")), min_chunks=5)
    again = open_reader(source(kind, tmp_path / "a"), min_chunks=5)
    sent = pickle.loads(pickle.dumps(reader))  # noqa: S301
    some = (1,) if kind == "stdlib_text" else range(5)  # parsing the library takes time
    chunks = [list(reader.read(chunk)) for chunk in some]
    assert chunks == [list(again.read(chunk)) for chunk in some] == [list(sent.read(chunk)) for chunk in some]
    assert reader.fingerprint == again.fingerprint == sent.fingerprint
    assert chunks[0] != list(reader.read(2))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("stdlib") and kind != "hub"])
def test_a_fingerprint_depends_on_names_sizes_and_layout_but_not_on_where_the_folder_is(
    tmp_path: Path, kind: str
) -> None:
    folder = corpus(tmp_path / "a")
    suffix = GLOBS[kind] or f"*.{kind}"
    seen = {open_reader(source(kind, folder), min_chunks=5).fingerprint}
    shutil.copytree(folder, tmp_path / "b")
    assert {open_reader(source(kind, tmp_path / "b"), min_chunks=5).fingerprint} == seen
    seen.add(open_reader(source(kind, folder), min_chunks=4).fingerprint)
    files = sorted(folder.glob(suffix))
    files[0].rename(folder / suffix.replace("*", "other"))
    seen.add(open_reader(source(kind, folder), min_chunks=5).fingerprint)
    shutil.copy(files[-1], folder / suffix.replace("*", "more"))
    seen.add(open_reader(source(kind, folder), min_chunks=5).fingerprint)
    assert len(seen) == 4


def rewrite(file: Path, *, at: float) -> None:
    """Another byte at a share of the file, of the same size and with the same time of change."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("kind", ["files", "lines", "jsonl", "parquet"])
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_rewritten_file_of_the_same_size_has_another_fingerprint(tmp_path: Path, kind: str, at: float) -> None:
    chosen = source(kind, corpus(tmp_path / "a"))
    if kind == "parquet":  # of which the rest says where the rows are
        at = min(at, 0.01) + 5 / 1000
    first = open_reader(chosen, min_chunks=2).fingerprint
    file = tmp_path / "a" / f"3.{'txt' if kind in ('files', 'lines') else kind}"
    os.utime(file, (1, 1))  # a copy has other times
    assert open_reader(chosen, min_chunks=2).fingerprint == first
    rewrite(file, at=at)
    assert open_reader(chosen, min_chunks=2).fingerprint != first


@pytest.mark.parametrize("at", [0.0, 1 / 63, 32 / 63, 1.0])
def test_of_a_large_file_blocks_from_beginning_to_end_count(tmp_path: Path, at: float) -> None:
    (tmp_path / "a.txt").write_bytes(b"0123456789abcde\n" * 100_000)
    chosen = Source(name="notes", kind="lines", path=str(tmp_path))
    first = open_reader(chosen, min_chunks=1).fingerprint
    rewrite(tmp_path / "a.txt", at=at)
    assert open_reader(chosen, min_chunks=1).fingerprint != first


def test_little_is_read_of_many_or_large_files(tmp_path: Path) -> None:
    for index in range(1200):
        (tmp_path / f"{index:04}").write_bytes(b"x" * 20)
    parts = list(list_files(Source(name="notes", kind="files", path=str(tmp_path))).digest_parts())
    assert len(parts) == 1200 + 1000
    (tmp_path / "large").write_bytes(b"x" * 10_000_000)
    (_, *blocks) = list_files(Source(name="notes", kind="files", path=str(tmp_path / "large"))).digest_parts()
    assert (len(blocks), set(map(len, blocks))) == (64, {4096})


def test_a_file_that_vanished_leaves_a_fingerprint(tmp_path: Path) -> None:
    chosen = source("files", corpus(tmp_path / "a"))
    whole, reader = open_reader(chosen, min_chunks=2), open_reader(chosen, min_chunks=2)
    assert whole.fingerprint
    (tmp_path / "a" / "3.txt").unlink()
    assert reader.fingerprint != whole.fingerprint


class Shards:
    num_shards, features = 3, None

    def select_columns(self, columns: list[str]) -> "Shards":
        return self


class Hub:
    """Stands in for `datasets`, which cannot be asked about the hub here; `head` is the newest commit."""

    head = "a1b2c3d4e5"

    def load_dataset_builder(
        self, path: str, *args: object, revision: str | None, **settings: object
    ) -> SimpleNamespace:
        return SimpleNamespace(hash=revision or self.head, as_streaming_dataset=lambda split: Shards())


def test_a_dataset_that_moved_on_has_another_fingerprint_unless_its_revision_is_given(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub = Hub()
    monkeypatch.setattr("datasets.load_dataset_builder", hub.load_dataset_builder)
    caplog.set_level("INFO", "datamodules")
    first = open_path("some/set", kind="hub").fingerprint
    assert first.startswith("a1b2c3d-")
    assert "source 'notes': dataset 'some/set' at revision a1b2c3d4e5" in caplog.text
    hub.head = "f6f6f6f6f6"
    assert open_path("some/set", kind="hub").fingerprint[8:] != first[8:]
    assert open_path("some/set", kind="hub", revision="a1b2c3d4e5").fingerprint == first


@pytest.mark.parametrize("settings", [{"config_name": "default"}, {"split": "train[:1]"}, {"data_files": ("0.jsonl",)}])
def test_a_hub_fingerprint_depends_on_what_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    monkeypatch.setattr("datasets.load_dataset_builder", Hub().load_dataset_builder)
    first = open_path("some/set", kind="hub")
    assert first.fingerprint == open_path("some/set", kind="hub").fingerprint
    assert first.fingerprint != open_path("some/set", kind="hub", **settings).fingerprint
    assert first.fingerprint != open_path("other/set", kind="hub").fingerprint
    assert first.fingerprint != open_path("some/set", kind="hub", min_chunks=4).fingerprint


def test_opening_reads_no_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = corpus(tmp_path / "a")

    def refuse(*args: object, **settings: object) -> None:
        raise AssertionError("opened a file")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        patch.setattr("builtins.open", refuse)
        readers = [
            open_reader(source(kind, folder), min_chunks=2) for kind in ("files", "lines", "jsonl", "stdlib_code")
        ]
    assert all(read_all(reader) for reader in readers[:3])
