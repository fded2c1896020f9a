from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.errors import DataError
from datamodules import Source
from datamodules.token_store import StoreSettings, TokenStore, open_store
from tests.unit.datamodules.corpora import two_sources, write_files


def store_settings(sources: list[Source]) -> StoreSettings:
    return StoreSettings(
        sources=tuple(sources),
        seq_len=16,
        validation_share=0.2,
        vocab_size=300,
        tokenizer=None,
        max_bad_share=0.05,
    )


def rows_of(store: TokenStore) -> list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
    return [array for of_split in store.rows.values() for packed in of_split for array in vars(packed).values()]


def same_rows(left: TokenStore, right: TokenStore) -> bool:
    return all(np.array_equal(*pair) for pair in zip(rows_of(left), rows_of(right), strict=True))


def documents(store: TokenStore, split: str) -> set[str]:
    rows = store.rows[split]  # type: ignore[index]
    return {
        store.tokenizer.decode(packed.document(index).tolist())
        for packed in rows
        for index in range(packed.num_documents)
    }


def test_every_document_is_on_exactly_one_side(tmp_path: Path) -> None:
    sources = two_sources(tmp_path)
    (tmp_path / "text" / "copy.txt").write_bytes((tmp_path / "code" / "1-003.txt").read_bytes())
    store = open_store(store_settings(sources), cache_dir=tmp_path / "cache")
    train, held_out = documents(store, "train"), documents(store, "validation")
    assert not train & held_out
    assert train | held_out == {file.read_text() for file in tmp_path.glob("*/*.txt")}
    assert 5 <= len(held_out) <= 35


def test_adding_files_moves_no_document_to_the_other_side(tmp_path: Path) -> None:
    settings = store_settings(two_sources(tmp_path))
    before = open_store(settings, cache_dir=tmp_path / "cache")
    write_files(tmp_path / "code", count=40, seed=0)
    after = open_store(settings, cache_dir=tmp_path / "cache")
    assert after.key != before.key
    assert documents(before, "train") < documents(after, "train")
    assert documents(before, "validation") < documents(after, "validation")


def test_a_second_opening_reads_no_document_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = store_settings(two_sources(tmp_path))
    built = open_store(settings, cache_dir=tmp_path / "cache")
    monkeypatch.setattr("datamodules.token_store.read_documents", None)  # calling any of these would fail
    monkeypatch.setattr("datamodules.token_store.encode_documents", None)
    loaded = open_store(settings, cache_dir=tmp_path / "cache")
    assert loaded.key == built.key
    assert same_rows(loaded, built)
    with pytest.raises(TypeError):  # the negative control
        open_store(replace(settings, seq_len=17), cache_dir=tmp_path / "cache")


def test_building_twice_gives_the_same(tmp_path: Path) -> None:
    settings = store_settings(two_sources(tmp_path))
    stores = [open_store(settings, cache_dir=tmp_path / name) for name in ("one", "two")]
    assert stores[0].key == stores[1].key
    assert same_rows(*stores)
    assert stores[0].tokenizer.get_vocab() == stores[1].tokenizer.get_vocab()


@pytest.mark.parametrize("victim", ["0-train.npz", "tokenizer/tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_store_is_built_again_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, victim: str, damage: str
) -> None:
    settings = store_settings(two_sources(tmp_path, count=20))
    built = open_store(settings, cache_dir=tmp_path / "cache")
    file = tmp_path / "cache" / built.key / victim
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    again = open_store(settings, cache_dir=tmp_path / "cache")
    assert "damaged" in caplog.text
    assert same_rows(again, built)
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [built.key]  # nothing half-built stays


def test_a_store_another_process_built_meanwhile_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = store_settings(two_sources(tmp_path, count=20))
    first = open_store(settings, cache_dir=tmp_path / "cache")
    hidden = iter([False, True])  # not there when we look, there when we are done
    original = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: next(hidden, True) if path.name == first.key else original(path))
    monkeypatch.setattr("datamodules.token_store._is_intact", lambda _folder: True)
    assert same_rows(open_store(settings, cache_dir=tmp_path / "cache"), first)


def test_neither_name_nor_weight_of_a_source_asks_for_another_build(tmp_path: Path) -> None:
    settings = store_settings(two_sources(tmp_path, count=20))
    renamed = tuple(replace(source, name=source.name.upper(), weight=9.0) for source in settings.sources)
    keys = {
        open_store(changed, cache_dir=tmp_path / "cache").key
        for changed in (settings, replace(settings, sources=renamed))
    }
    assert len(keys) == 1


def test_a_given_tokenizer_is_used_and_its_content_is_part_of_the_key(tmp_path: Path) -> None:
    settings = store_settings(two_sources(tmp_path, count=20))
    trained = open_store(settings, cache_dir=tmp_path / "cache")
    for place in ("here", "there"):
        trained.tokenizer.save_pretrained(tmp_path / place)
    given = [
        open_store(replace(settings, tokenizer=str(tmp_path / place)), cache_dir=tmp_path / "cache")
        for place in ("here", "there")
    ]
    assert given[0].key != trained.key
    assert same_rows(given[0], trained)
    # where a tokenizer lies does not matter
    assert given[0].key == given[1].key


def test_all_documents_held_out_names_source_and_fix(tmp_path: Path) -> None:
    sources = [Source(name="single", kind="files", path=str(write_files(tmp_path / "single", count=1, seed=0)))]
    settings = replace(store_settings(sources), validation_share=0.999)
    with pytest.raises(DataError, match=r"'single'.*lower validation_share"):
        open_store(settings, cache_dir=tmp_path / "cache")


def test_a_source_with_nothing_held_out_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    settings = replace(store_settings(two_sources(tmp_path, count=10)), validation_share=1e-9)
    open_store(settings, cache_dir=tmp_path / "cache")
    assert "source 'code': none of its 10 documents" in caplog.text
