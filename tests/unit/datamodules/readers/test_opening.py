from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.errors import ConfigError
from datamodules.readers import open_reader
from datamodules.readers.opening import FILE_READERS
from datamodules.sources import Source, SourceKind
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
    seen.add(open_reader(source(kind, folder), min_chunks=5, seed=1).fingerprint)
    files = sorted(folder.glob(suffix))
    files[0].rename(folder / suffix.replace("*", "other"))
    seen.add(open_reader(source(kind, folder), min_chunks=5).fingerprint)
    shutil.copy(files[-1], folder / suffix.replace("*", "more"))
    seen.add(open_reader(source(kind, folder), min_chunks=5).fingerprint)
    assert len(seen) == 5


@pytest.mark.parametrize("settings", [{"config_name": "default"}, {"split": "train[:1]"}, {"data_files": ("0.jsonl",)}])
def test_a_hub_fingerprint_depends_on_what_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    class Shards:
        num_shards, features = 3, None

        def select_columns(self, columns: list[str]) -> Shards:
            return self

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **settings: Shards())
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


def test_no_chunk_at_all_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min_chunks"):
        open_path(corpus(tmp_path / "a"), kind="files", min_chunks=0)
