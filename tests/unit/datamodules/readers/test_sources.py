from pathlib import Path
from typing import Any, get_args

import pytest

from app.errors import ConfigError
from datamodules.readers.records import Document
from datamodules.readers.sources import KINDS, Source, SourceKind

EFFECTIVE: dict[SourceKind, dict[str, Any]] = {
    "stdlib_code": {},
    "stdlib_text": {},
    "files": {"path": "a", "glob": "*.py", "exclude": ("b/",)},
    "lines": {"path": "a", "glob": "*.txt", "exclude": ("b/",)},
    "jsonl": {"path": "a", "glob": "*.json", "exclude": ("b/",), "field": "content"},
    "parquet": {"path": "a", "glob": "*.pq", "exclude": ("b/",), "field": "content"},
    "hub": {
        "path": "a/b",
        "field": "content",
        "config_name": "en",
        "split": "test",
        "revision": "v1",
        "data_files": ("a.json",),
    },
}
ALL_FIELDS = EFFECTIVE["hub"] | EFFECTIVE["files"]


def test_table_has_every_kind() -> None:
    assert set(KINDS) == set(get_args(SourceKind)) == set(EFFECTIVE)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kind": "web"}, "kind"),
        ({"kind": "stdlib_code", "weight": 0.0}, "weight"),
        ({"kind": "stdlib_code", "weight": float("nan")}, "weight"),
        ({"kind": "stdlib_code", "weight": float("inf")}, "weight"),
        ({"kind": "files"}, "path"),
        ({"kind": "hub"}, "path"),
        ({"kind": "files", "path": "a", "glob": ""}, "glob"),
        ({"kind": "files", "path": "a", "glob": "/etc/*"}, "glob"),
        ({"kind": "files", "path": "a", "glob": "../*"}, "glob"),
        ({"kind": "files", "path": "a", "exclude": ("!",)}, "exclude"),
        ({"kind": "jsonl", "path": "a", "field": ""}, "field"),
        ({"kind": "files", "path": "a", "max_document_megabytes": 0}, "max_document_megabytes"),
        ({"kind": "files", "path": "a", "max_document_megabytes": 1e4}, "max_document_megabytes"),
        ({"kind": "files", "path": "a", "max_document_megabytes": float("nan")}, "max_document_megabytes"),
        ({"kind": "hub", "path": "a", "split": ""}, "split"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_at_once(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Source(**settings)
    assert caught.value.field == field


@pytest.mark.parametrize("kind", get_args(SourceKind))
def test_exactly_the_fields_without_effect_warn(kind: SourceKind, caplog: pytest.LogCaptureFixture) -> None:
    Source(kind=kind, name="a", weight=2.0, max_document_megabytes=1.0, **EFFECTIVE[kind])
    assert not caplog.text
    Source(kind=kind, **(ALL_FIELDS | EFFECTIVE[kind]))
    idle = sorted(set(ALL_FIELDS) - set(EFFECTIVE[kind]))
    assert f"{' and '.join(idle)} have no effect on a source of kind {kind}" in caplog.text


def test_a_path_does_not_move_the_standard_library() -> None:
    assert Source(kind="stdlib_code", path="elsewhere").root == Source(kind="stdlib_code").root != Path("elsewhere")


def test_about_the_asked_share_is_held_out_by_content_alone() -> None:
    texts = [f"document {index}" for index in range(2000)]
    sides = [Document("here", text, origin=text).is_held_out(share=0.05) for text in texts]
    assert 60 <= sum(sides) <= 140
    assert sides == [Document("elsewhere", text, origin=text).is_held_out(share=0.05) for text in texts]
