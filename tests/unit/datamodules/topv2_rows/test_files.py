import logging
from pathlib import Path

import datasets
import pytest

from app.errors import ConfigError, DataError
from app.topv2.semantic_parse import TARGET_FORMATS
from datamodules.topv2_rows.files import AnnotatedUtterance, Split, TsvTable, find_tables, read_rows
from tests.support.topv2_folders import DOMAINS, HEADER, rows_of, write_folder, write_tsv

GOOD = "weather\tis it hot\t[IN:GET_WEATHER is it [SL:WEATHER_ATTRIBUTE hot ] ]"
ENCODE = TARGET_FORMATS["parse"].encode


def read(
    path: Path | str,
    *,
    split: Split = "train",
    spis: int | None = None,
    max_bad_share: float = 0.0,
    domain: str = "weather",
) -> list[AnnotatedUtterance]:
    (table,) = find_tables(str(path), split=split, domains=[domain], spis=spis)
    return read_rows(table, encode=ENCODE, max_bad_share=max_bad_share)


def folder_of(folder: Path, *lines: str | bytes, end: bytes = b"\n") -> Path:
    raw = [line if isinstance(line, bytes) else line.encode() for line in (HEADER, *lines)]
    (folder / "weather_train.tsv").write_bytes(b"".join(line + end for line in raw))
    return folder


def test_each_domain_and_split_is_a_file(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert read(tmp_path, split="test") == [
        AnnotatedUtterance(*fields) for fields in rows_of("weather", count=17, seed=12)
    ]
    tables = find_tables(str(tmp_path), split="eval", domains=DOMAINS[::-1], spis=None)
    assert [Path(table.name).name for table in tables] == ["weather_eval.tsv", "reminder_eval.tsv"]


def test_low_resource_splits_are_for_training_and_evaluation_and_name_their_column_otherwise(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert len(read(tmp_path, spis=10)) == 12
    assert len(read(tmp_path, split="eval", spis=10)) == 6
    assert read(tmp_path, split="test", spis=10) == read(tmp_path, split="test")
    with pytest.raises(DataError, match=r"no file .*weather_train_25spis.tsv"):
        read(tmp_path, spis=25)


def test_quotes_carriage_returns_and_odd_spaces_are_data_not_syntax(tmp_path: Path) -> None:
    lines = ['weather\t"is it\x0b hot\t[IN:GET_WEATHER " is it ]', "weather\t so\u2028\rhot \t[IN:GET_WEATHER so ]"]
    plain, windows = tmp_path / "plain", tmp_path / "windows"
    for folder in (plain, windows):
        folder.mkdir()
    rows = read(folder_of(plain, *lines))
    assert [row.utterance for row in rows] == ['"is it\x0b hot', " so\u2028\rhot "]
    assert read(folder_of(windows, *lines, end=b"\r\n")) == rows
    file = plain / "weather_train.tsv"
    file.write_bytes("\ufeff".encode() + file.read_bytes())
    assert read(plain) == rows


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("weather\tis it hot", "2 columns, not 3"),
        (f"{GOOD}\tmore", "4 columns, not 3"),
        (f"{GOOD}\t", "4 columns, not 3"),
        ("", "1 columns, not 3"),
        (GOOD.replace("weather\t", "alarm\t"), "domain 'alarm', not 'weather'"),
        (GOOD.replace("\tis it hot\t", "\t \t"), "no utterance"),
        (GOOD[:-2], r"no \] for IN:GET_WEATHER"),
        (GOOD + " ]", "the parse has ended"),
        (GOOD.replace("IN:", "XX:"), "'XX:GET_WEATHER' is no label"),
        (GOOD.encode() + b" \xff", f"not UTF-8 at byte {len(GOOD) + 1}"),
    ],
)
def test_a_bad_row_is_skipped_and_told_with_file_and_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str | bytes, reason: str
) -> None:
    folder_of(tmp_path, GOOD, line, GOOD)
    with caplog.at_level(logging.INFO):
        assert len(read(tmp_path, max_bad_share=0.4)) == 2
    assert "1 of 3 rows skipped" in caplog.text
    where = rf"weather_train.tsv:3: .*{reason}"
    with pytest.raises(DataError, match=rf"more than max_bad_share 0.3 is bad.*1 of 3 rows skipped\n.*{where}"):
        read(tmp_path, max_bad_share=0.3)


def test_a_report_shows_twenty_bad_rows_and_the_log_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_of(tmp_path, GOOD, *["weather"] * 30)
    with caplog.at_level(logging.INFO), pytest.raises(DataError, match="30 of 31 rows skipped") as caught:
        read(tmp_path)
    assert str(caught.value).count("1 columns, not 3") == 20
    assert [record.levelname for record in caplog.records] == ["INFO"] * 30
    assert caplog.text.count("1 columns, not 3") == 30


def test_a_file_without_a_usable_row_is_an_error_whatever_the_share(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable row; 1 of 1 rows skipped"):
        read(folder_of(tmp_path, "weather"), max_bad_share=1.0)
    with pytest.raises(DataError, match="no usable row"):
        read(folder_of(tmp_path), max_bad_share=1.0)


def test_another_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weather_train.tsv").write_bytes(b"\x80\x02pickle")
    with pytest.raises(DataError, match=r"weather_train.tsv:1: got columns \['\ufffd\\x02pickle'\]"):
        read(tmp_path)
    write_tsv(tmp_path / "weather_train.tsv", [GOOD.split("\t")], header="domain\tutterance\tparse")
    with pytest.raises(DataError, match=r"weather_train.tsv:1: got columns \['domain', 'utterance', 'parse'\]"):
        read(tmp_path)


@pytest.mark.parametrize("path", ["nowhere", "/nowhere/topv2", "../nowhere/topv2", "no/where/topv2"])
def test_a_folder_that_is_not_there_is_named_without_asking_a_hub(path: str) -> None:
    with pytest.raises(DataError, match=f"no folder '{path}'"):
        read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(DataError, match=r"no file .*alarm_train.tsv"):
        read(tmp_path, domain="alarm")


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def fingerprint(line: str) -> str:
        folder_of(tmp_path, line)
        return find_tables(str(tmp_path), split="train", domains=["weather"], spis=None)[0].fingerprint

    assert fingerprint(GOOD) == fingerprint(GOOD) != fingerprint(GOOD.replace("hot", "cold"))


@pytest.fixture
def dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def small_dataset(*, count: int = 5, **columns: list[str | None]) -> datasets.Dataset:
    rows = [row for domain in DOMAINS for row in rows_of(domain, count=count, seed=count)]
    named: dict[str, list[str | None]] = {
        name: [row[index] for row in rows] for index, name in enumerate(HEADER.split("\t"))
    }
    return datasets.Dataset.from_dict(named | columns)


@pytest.mark.usefixtures("dataset_cache")
def test_a_dataset_folder_is_read_in_the_shapes_it_comes_in(tmp_path: Path) -> None:
    splits = {"train": small_dataset(count=5), "eval": small_dataset(count=4), "test": small_dataset(count=3)}
    parquet, saved, lines = tmp_path / "parquet", tmp_path / "saved", tmp_path / "lines"
    for name, split in splits.items():  # as the hub copy lies there
        (parquet / "data").mkdir(parents=True, exist_ok=True)
        split.to_parquet(parquet / "data" / f"{name}-00000-of-00001.parquet")
        lines.mkdir(exist_ok=True)
        split.to_json(lines / f"{'validation' if name == 'eval' else name}.jsonl")
    datasets.DatasetDict(splits).save_to_disk(saved)
    for folder in (parquet, lines, saved):
        for split, count in (("train", 5), ("eval", 4), ("test", 3)):
            expected = [AnnotatedUtterance(*fields) for fields in rows_of("weather", count=count, seed=count)]
            assert read(folder, split=split) == expected, (folder, split)  # type: ignore[arg-type]


@pytest.mark.usefixtures("dataset_cache")
def test_what_a_dataset_lacks_is_named(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": small_dataset().remove_columns("utterance")}).save_to_disk(tmp_path / "a")
    with pytest.raises(DataError, match=r"a \(train\): no column utterance in domain, semantic_parse"):
        read(tmp_path / "a")
    datasets.DatasetDict({"train": small_dataset().remove_columns("domain")}).save_to_disk(tmp_path / "b")
    with pytest.raises(DataError, match=r"b \(train\): no column domain in utterance, semantic_parse"):
        read(tmp_path / "b")
    with pytest.raises(DataError, match="no split eval or validation in train"):
        read(tmp_path / "a", split="eval")
    with pytest.raises(ConfigError, match="spis: got 10, allowed null"):
        read(tmp_path / "a", spis=10)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither TSV files nor a dataset that can be read"):
        read(tmp_path / "empty")


@pytest.mark.usefixtures("dataset_cache")
def test_tables_of_a_dataset_keep_the_order_asked_for_and_know_their_content(tmp_path: Path) -> None:
    def tables(name: str, rows: datasets.Dataset) -> list[TsvTable]:
        datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / name)
        return find_tables(str(tmp_path / name), split="train", domains=["weather", "reminder"], spis=None)

    one, same = tables("one", small_dataset()), tables("same", small_dataset())
    assert [table.domain for table in one] == ["weather", "reminder"]
    assert [table.fingerprint for table in one] == [table.fingerprint for table in same]
    other = tables("other", small_dataset(utterance=[*["text"] * 9, "texts"]))  # of the second domain
    assert one[0].fingerprint != other[0].fingerprint
    changed = tables("changed", small_dataset(utterance=["text"] * 10))
    assert (changed[1].fingerprint == other[1].fingerprint, changed[0] == other[0]) == (True, False)


@pytest.mark.usefixtures("dataset_cache")
def test_bad_rows_of_a_dataset_are_told_by_their_number(tmp_path: Path) -> None:
    utterances: list[str | None] = ["text"] * 8 + [None, "text"]
    domains: list[str | None] = ["reminder"] * 5 + ["weather"] * 4 + [None]
    rows = small_dataset(utterance=utterances, domain=domains)
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "a")
    with pytest.raises(DataError, match=r"2 of 5 rows skipped\n.*:8: no text in utterance\n.*:9: no text in domain"):
        read(tmp_path / "a")
    numbers = small_dataset().remove_columns("utterance").add_column("utterance", [7] * 10)
    datasets.DatasetDict({"train": numbers}).save_to_disk(tmp_path / "b")
    with pytest.raises(DataError, match=r"5 of 5 rows skipped\n.*:5: no text in utterance"):
        read(tmp_path / "b")
