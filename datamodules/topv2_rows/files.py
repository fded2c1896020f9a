"""TOPv2 as it lies on disk or on the hub: which files make up a split, and the rows in them that can be used.

The official release has one TSV file for each domain and split, without quoting: a line is split at its tabs and at
nothing else. Its low-resource splits lie in a folder beside them, with another name for the third column. Reading has
two steps, as the cache needs: tables with a fingerprint, which is quick, and then the rows in them.
"""

import logging
import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
from datasets.exceptions import DatasetsError

from app.errors import ConfigError, DataError
from app.topv2.semantic_parse import ParseError

_log = logging.getLogger(__name__)

Split = Literal["train", "eval", "test"]

DOMAINS = ("alarm", "event", "messaging", "music", "navigation", "reminder", "timer", "weather")
LOW_RESOURCE_DOMAINS = ("reminder", "weather")
SPIS = (10, 25, 50, 100, 250, 500, 1000)  # samples per intent and slot of the low-resource splits

_COLUMNS = ("domain", "utterance", "semantic_parse")
_HEADERS = ([*_COLUMNS], [*_COLUMNS[:2], "seqlogical"])  # the second is that of the low-resource splits
_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "eval": ("eval", "validation"), "test": ("test",)}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SHOWN = 20  # bad rows in an error; the log has all


def choose_domains(domains: Sequence[str] | None, *, spis: int | None) -> tuple[str, ...]:
    """Return the domains, by default all; ConfigError if one is unknown or given twice, or `spis` is unknown."""
    if spis is not None and spis not in SPIS:
        raise ConfigError("spis", got=spis, allowed=" | ".join(map(str, SPIS)))
    available = DOMAINS if spis is None else LOW_RESOURCE_DOMAINS
    chosen = tuple(available if domains is None else domains)
    if not chosen or not set(chosen) <= set(available) or len(set(chosen)) < len(chosen):
        fix = f"only these have low-resource splits (spis {spis})" if spis is not None else ""
        raise ConfigError("domains", got=list(chosen), allowed=f"each once, of {', '.join(available)}", fix=fix)
    return chosen


class AnnotatedUtterance(NamedTuple):
    """One annotated utterance; `target` is the parse in the format the model is to write."""

    domain: str
    utterance: str
    target: str


class TsvTable(NamedTuple):
    """The rows of one domain and split, not looked at yet."""

    name: str  # of the file or dataset split, for messages
    domain: str  # the only one that is right in it
    fingerprint: str  # of the content
    rows: Sequence[tuple[int, bytes | Sequence[Any]]]  # the number of each, with its line or its fields


def find_tables(path: str, *, split: Split, domains: Sequence[str], spis: int | None) -> list[TsvTable]:
    """Find the tables of `split`, one for each domain; `spis` chooses a low-resource split, but not of test.

    `path` is the official folder of TSV files, or a local folder or hub id that `datasets` reads. DataError says that a
    file or dataset is missing or has other columns, and ConfigError that a dataset has no low-resource splits.
    """
    folder = Path(path)
    if folder.is_dir() and any(folder.glob("*.tsv")):
        return [_read_tsv(folder / _file_name(domain, split, spis), domain) for domain in domains]
    if spis is not None:
        raise ConfigError("spis", got=spis, allowed="null, unless path is the official folder of TSV files")
    dataset = _load_dataset(path, split)
    name = f"{path} ({split})"
    if missing := [column for column in _COLUMNS if column not in dataset.column_names]:
        raise DataError(f"{name}: no column {', '.join(missing)} in {', '.join(dataset.column_names)}")
    rows = list(enumerate(map(list, zip(*(dataset[column] for column in _COLUMNS), strict=True))))
    of_domains = {domain: [row for row in rows if row[1][0] in (domain, None)] for domain in domains}  # None is bad
    return [TsvTable(name, domain, sha256(repr(own).encode()).hexdigest(), own) for domain, own in of_domains.items()]


def read_rows(table: TsvTable, *, encode: Callable[[str], str], max_bad_share: float) -> list[AnnotatedUtterance]:
    """Return the usable rows of `table`; others are skipped, counted and logged with their locations.

    `encode` makes the target from the annotation, or raises ParseError. DataError says that nothing is left, or that
    more than `max_bad_share` of the rows had to be skipped.
    """
    rows: list[AnnotatedUtterance] = []
    bad: list[str] = []
    for number, raw in table.rows:
        try:
            rows.append(_row(raw, domain=table.domain, encode=encode))
        except ParseError as error:
            bad.append(f"{table.name}:{number}: {error}")
    for reason in bad:
        _log.info("skipped %s", reason)
    total = len(rows) + len(bad)
    report = f"{len(bad)} of {total} rows skipped" + "".join(f"\n  {reason}" for reason in bad[:_SHOWN])
    if not rows:
        raise DataError(f"{table.name}: no usable row; {report}")
    if len(bad) > max_bad_share * total:
        raise DataError(f"{table.name}: more than max_bad_share {max_bad_share} is bad; mend the rows; {report}")
    if bad:
        _log.warning("%s: %s", table.name, report)
    return rows


def _row(raw: bytes | Sequence[Any], *, domain: str, encode: Callable[[str], str]) -> AnnotatedUtterance:
    try:
        fields: Sequence[Any] = raw.decode().rstrip("\r").split("\t") if isinstance(raw, bytes) else raw
    except UnicodeDecodeError as error:
        raise ParseError(f"not UTF-8 at byte {error.start}") from error
    if len(fields) != len(_COLUMNS):
        raise ParseError(f"{len(fields)} columns, not {len(_COLUMNS)}")
    if wrong := [column for column, value in zip(_COLUMNS, fields, strict=True) if not isinstance(value, str)]:
        raise ParseError(f"no text in {', '.join(wrong)}")
    found, utterance, parse = fields
    if found != domain:
        raise ParseError(f"domain {found!r}, not {domain!r}")
    if not utterance.strip():
        raise ParseError("no utterance")
    return AnnotatedUtterance(domain, utterance, encode(parse))


def _file_name(domain: str, split: Split, spis: int | None) -> str:
    if spis is None or split == "test":
        return f"{domain}_{split}.tsv"
    return f"low_resource_splits/{domain}_{'valid' if split == 'eval' else split}_{spis}spis.tsv"


def _read_tsv(file: Path, domain: str) -> TsvTable:
    if not file.is_file():
        raise DataError(f"no file {str(file)!r}; correct path or domains, or complete the folder")
    header, *lines = file.read_bytes().removesuffix(b"\n").split(b"\n")
    columns = header.decode("utf-8-sig", errors="replace").rstrip("\r").split("\t")
    if columns not in _HEADERS:
        raise DataError(f"{file}:1: got columns {columns}, allowed {' or '.join(map(str, _HEADERS))}")
    return TsvTable(str(file), domain, sha256(b"\n".join(lines)).hexdigest(), list(enumerate(lines, start=2)))


def _load_dataset(path: str, split: Split) -> Any:  # datasets.Dataset
    folder = Path(path)
    if not folder.is_dir() and not _HUB_ID.fullmatch(path):
        raise DataError(f"no folder {path!r}; give TOPv2's, or a hub id such as owner/name")
    try:
        saved = (folder / "dataset_dict.json").is_file()  # by save_to_disk
        found = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(f"{path}: neither TSV files nor a dataset that can be read: {error}") from error
    for name in _SPLIT_NAMES[split]:
        if name in found:
            return found[name]
    raise DataError(f"{path}: no split {' or '.join(_SPLIT_NAMES[split])} in {', '.join(found)}")
