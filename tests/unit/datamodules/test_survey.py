from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import DataError
from datamodules.packing import Tokens
from datamodules.sources import Document, Source
from datamodules.survey import Survey, spread_rows, survey
from tests.unit.datamodules.corpora import write_files


def look(folder: Path, **changes: Any) -> Survey:
    settings: dict[str, Any] = {
        "training_bytes": 10**6,
        "held_out_bytes": 10**6,
        "validation_share": 0.3,
        "max_bad_share": 0.05,
    }
    return survey(Source(kind="files", path=str(folder), name="code"), **(settings | changes))


def is_held_out(text: str) -> bool:
    return Document("", text, origin=text).is_held_out(share=0.3)


def test_all_of_a_small_source_is_found_each_text_on_its_side(tmp_path: Path) -> None:
    folder = write_files(tmp_path, count=60, seed=1)
    found, texts = look(folder), [file.read_text() for file in folder.iterdir()]
    assert sorted(found.held_out) == sorted(filter(is_held_out, texts))
    assert sorted(found.training) == sorted(text for text in texts if not is_held_out(text))
    assert found.held_out
    assert found == look(folder)


def test_added_files_move_no_document_to_the_other_side(tmp_path: Path) -> None:
    before = look(write_files(tmp_path, count=60, seed=1))
    after = look(write_files(tmp_path, count=60, seed=2))
    assert set(before.held_out) < set(after.held_out)
    assert set(before.training) < set(after.training)


def test_no_more_is_read_than_is_wanted(tmp_path: Path) -> None:
    folder = write_files(tmp_path, count=300, seed=1)
    little = look(folder, training_bytes=2000, held_out_bytes=2000)
    assert 2000 <= sum(map(len, little.training)) < 4000
    assert 2000 <= sum(map(len, little.held_out)) < 40_000  # a long one counts for its share alone
    assert len(little.held_out) < len(look(folder).held_out)
    assert look(folder, training_bytes=0).training[1:] == []


def test_a_long_document_does_not_stand_for_all(tmp_path: Path) -> None:
    folder = write_files(tmp_path, count=20, seed=1)
    (folder / "0.txt").write_text("novel " * 10_000)
    assert len(look(folder, training_bytes=3000).training) >= 4


def test_a_source_without_training_documents_or_with_bad_ones_is_named(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "a", count=3, seed=1)
    with pytest.raises(DataError, match="source 'code': no training document, all fell to validation; lower"):
        look(folder, validation_share=1 - 1e-9)
    for index in range(2):
        (folder / f"bad{index}.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"2 of 5 records are bad, more than max_bad_share 0.05[^$]*bad\d.txt"):
        look(folder)
    assert look(folder, max_bad_share=0.4).training


def test_rows_are_spread_over_the_documents() -> None:
    documents: list[Tokens] = [np.full(length, index, dtype=np.int32) for index, length in enumerate([8, 800, 8, 8])]
    rows = spread_rows(documents, seq_len=8, num_rows=100)
    assert [row.input_ids[0] for row in rows] == [0, 1, 1, 1, 1, 2, 3]  # a long document gives its head
    assert [row.input_ids[0] for row in spread_rows(documents, seq_len=8, num_rows=3)] == [0, 1, 1]
    assert spread_rows([], seq_len=8, num_rows=3) == []
