"""Reads the rows of a task, from local files or the hub, and makes examples of them; errors name file, row and column.

Tested by tests/unit/evaluation/test_rows.py.
"""

import csv
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from app.errors import ConfigError, DataError, check_range, shortened
from app.evaluation.task import AnswerExample, ChoiceExample, Example, Row, Task, TextTask

_ALIASES = {"validation": ("validation", "valid", "val", "dev", "eval")}  # how files spell the name of a split
_SPLITS = frozenset({"train", "test", "prompt", *_ALIASES["validation"]})
_BETWEEN_SHOTS = "\n\n"


class Item(NamedTuple):
    """An example of a task, and where it came from.

    Attributes:
        row: Its index among the rows of the task.
        group: What its results are told by beside the whole, such as a subject; "" for nothing.
        location: File and row.
        example: The example, with description and worked examples before it.
    """

    row: int
    group: str
    location: str
    example: Example


def read_items(task: Task, path: str | None, *, limit: int | None = None, num_shots: int | None = None) -> list[Item]:
    """The examples of a task.

    Args:
        path: Local file or folder; None takes the dataset of the hub.
        limit: Take so many rows, at least 1: as many of each group as of any other, from all over it.
        num_shots: Worked examples before each, instead of the task's own number.

    Raises:
        ConfigError: The task cannot have worked examples.
        DataError: Rows cannot be read, there are none, or one is not what the task needs.
    """
    if limit is not None:
        check_range("limit", limit, low=1)
    shots = task.num_shots if num_shots is None or isinstance(task, TextTask) else num_shots
    check_range("num_shots", shots, low=0)
    where = f"task {task.name}: {path if path is not None else task.hub and task.hub.path}"
    rows = _rows(task, path, shots=False)
    if not rows:
        raise DataError(f"{where} holds no row")
    groups = [task.group(row) for row in rows]
    chosen = spread(groups, len(rows) if isinstance(task, TextTask) else limit)  # a limit of texts counts windows
    prefixes = _prefixes(task, path, {groups[index] for index in chosen}, num_shots=shots, where=where) if shots else {}
    items = []
    for index in chosen:
        row = rows[index]
        example = _checked(task.example(row), row)
        if isinstance(example, ChoiceExample | AnswerExample):
            example = example.after(task.description(row) + prefixes.get(groups[index], ""))
        items.append(Item(index, groups[index], row.location, example))
    return items


def spread(groups: Sequence[str], limit: int | None) -> list[int]:
    """The indices of at most `limit` members, as many of each group as of any other, drawn from all over the group.

    They are the same at every call, and a higher limit only adds to them. The first rows would not do, since some files
    are ordered by answer or domain.
    """
    if limit is None or limit >= len(groups):
        return list(range(len(groups)))
    shuffled = list(range(len(groups)))
    random.Random(0).shuffle(shuffled)
    seen: dict[str, int] = {}
    turns = []
    for turn, index in enumerate(shuffled):
        rank = seen[groups[index]] = seen.get(groups[index], -1) + 1
        turns.append((rank, turn, index))
    return sorted(index for *_, index in sorted(turns)[:limit])


def _checked(example: Example, row: Row) -> Example:
    fields = (field if isinstance(field, tuple) else (field,) for field in example)
    try:
        "".join(text for texts in fields for text in texts if isinstance(text, str)).encode()
    except UnicodeEncodeError as error:  # half of a pair, which JSON can spell; no tokenizer takes it
        raise DataError(f"{row.location}: a text is not Unicode ({error.reason})") from error
    if isinstance(example, ChoiceExample):
        if not all(map(str.strip, example.choices)):
            raise DataError(f"{row.location}: got a choice without a text, allowed choices of at least one character")
        if not 0 <= example.answer < len(example.choices):
            allowed = f"0..{len(example.choices) - 1}"
            raise DataError(f"{row.location}: got {example.answer} as the index of the answer, allowed {allowed}")
    return example


def _prefixes(task: Task, path: str | None, groups: set[str], *, num_shots: int, where: str) -> Mapping[str, str]:
    """The worked examples of each group as one text; they are the first ones of the group, as in other harnesses."""
    if task.hub is None or task.hub.shots_split is None:
        raise ConfigError("num_shots", got=num_shots, allowed=f"0 for task {task.name}, which has no worked examples")
    by_group: dict[str, list[str]] = {}
    for row in _rows(task, path, shots=True):
        solved = by_group.setdefault(task.group(row), [])
        if len(solved) < num_shots:
            example = _checked(task.example(row), row)
            assert isinstance(example, ChoiceExample | AnswerExample)  # texts have no worked examples
            solved.append(example.solved + _BETWEEN_SHOTS)
    for group in groups:
        if (found := len(by_group.get(group, ()))) < num_shots:
            of_group = f" of {group}" if group else ""
            fix = f"give a folder with more rows{of_group} in files named {' or '.join(_names(task.hub.shots_split))}"
            raise ConfigError("num_shots", got=num_shots, allowed=f"0..{found} with {where}", fix=fix)
    return {group: "".join(solved) for group, solved in by_group.items()}


def _rows(task: Task, path: str | None, *, shots: bool) -> list[Row]:
    if path is None:
        return list(_hub_rows(task, shots=shots))
    read = (row for file in _files(task, Path(path), shots=shots) for row in read_file(file, task.csv_columns))
    return [row for each in read for row in task.unfold(each)]


def _files(task: Task, path: Path, *, shots: bool) -> list[Path]:
    """The files of a folder that belong to the split; if none bears its name, those without the name of the shots'."""
    if not path.exists():
        raise DataError(f"task {task.name}: {path} does not exist; write NAME=PATH with a local file or folder")
    if path.is_file() and not shots:
        if path.suffix not in task.suffixes:
            raise DataError(f"task {task.name}: {path} is a {path.suffix!r} file, allowed {' | '.join(task.suffixes)}")
        return [path]
    folder = path.parent if path.is_file() else path
    files = sorted(
        file for file in folder.rglob("*") if file.suffix in task.suffixes and file.is_file() and file != path
    )
    split = task.hub and (task.hub.shots_split if shots else task.hub.split)
    named = [file for file in files if split and _bears(file.relative_to(folder), split)]
    if named or shots:
        return named
    other = task.hub and task.hub.shots_split
    return [file for file in files if not (other and _bears(file.relative_to(folder), other))]


def _names(split: str) -> tuple[str, ...]:
    return _ALIASES.get(split, (split,))


def _bears(file: Path, split: str) -> bool:
    """Whether its own name says so, or its folders' where that names no split: `x-train-dev/train.jsonl` is no dev."""
    own, whole = ({*re.split(r"[^a-z]+", name.lower())} for name in (file.stem, str(file.with_suffix(""))))
    return not (whole if own.isdisjoint(_SPLITS) else own).isdisjoint(_names(split))


def read_file(file: Path, csv_columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a file; a text file is one row with the column `text`.

    Args:
        csv_columns: The columns of a CSV file without a header.

    Raises:
        DataError: The file cannot be read; the message names it, and the row.
    """
    try:
        for number, values in enumerate(_values(file, csv_columns), start=1):
            location = f"{file}, row {number}"
            if not isinstance(values, dict):
                raise DataError(f"{location}: got {type(values).__name__}, allowed an object with columns")
            yield Row(values, location, file.stem)
    except (OSError, ValueError, LookupError, RecursionError, csv.Error, ElementTree.ParseError) as error:
        raise DataError(f"{file} cannot be read: {shortened(error)}") from error


def _values(file: Path, csv_columns: Sequence[str]) -> Iterable[Any]:
    match file.suffix:
        case ".parquet":
            import pyarrow.parquet as pq  # other kinds of files need not wait for it

            return pq.read_table(file).to_pylist()  # type: ignore[no-any-return]
        case ".txt":
            return [{"text": file.read_text("utf-8-sig")}]
        case ".csv" | ".tsv":
            return _table(file, csv_columns)
        case ".json":
            content = json.loads(file.read_text("utf-8-sig"))
            return content if isinstance(content, list) else [content]
        case ".xml":
            root = ElementTree.parse(file).getroot()  # noqa: S314 (expat bounds what entities may grow to)
            return [{**item.attrib, **{part.tag: part.text for part in item}} for item in root]
        case _:
            return _labelled(file, _lines(file))


def _labelled(file: Path, rows: Iterator[Any]) -> Iterator[Any]:
    """The rows with their labels where those are in a file of their own, as in PIQA: `valid-labels.lst`."""
    beside = file.with_name(f"{file.stem}-labels.lst")
    if not beside.exists():
        yield from rows
        return
    of_file, labels = list(rows), beside.read_text("utf-8-sig").split()
    if len(labels) != len(of_file):
        raise DataError(f"{beside}: got {len(labels)} labels, allowed {len(of_file)}: one for each row of {file.name}")
    for values, label in zip(of_file, labels, strict=True):
        yield {"label": label, **values} if isinstance(values, dict) else values


def _lines(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{file}, line {number}: not JSON ({shortened(error)})") from error


def _table(file: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of cells by column; tab-separated files have no quotes, as TOPv2's."""
    style: dict[str, Any] = {} if file.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, **style)
        first = next(rows, None)
        if first is None:
            return
        is_header = not columns or set(columns) <= set(first)
        names = first if is_header else list(columns)
        before: list[list[str]] = [] if is_header else [first]
        for number, cells in enumerate([*before, *rows], start=1):
            if cells:
                if len(cells) != len(names):
                    allowed = f"{len(names)}: {', '.join(names)}"
                    raise DataError(f"{file}, row {number}: got {len(cells)} columns, allowed {allowed}")
                yield dict(zip(names, cells, strict=True))


def _hub_rows(task: Task, *, shots: bool) -> Iterator[Row]:
    if (hub := task.hub) is None:
        raise DataError(f"task {task.name} has no dataset of its own; write {task.name}=PATH with a file or folder")
    import datasets  # this takes a second, for which local files need not wait

    split = hub.shots_split if shots else hub.split
    where = f"{hub.path}[{split}]"
    try:
        rows = datasets.load_dataset(hub.path, hub.config, split=split, revision=hub.revision)
    except Exception as error:  # the library and the network may raise anything
        reason = f"{type(error).__name__}: {shortened(error)}"
        fix = f"check the network, or write {task.name}=PATH with a local file or folder"
        raise DataError(f"task {task.name}: dataset {where} cannot be opened: {reason}; {fix}") from error
    for number, values in enumerate(rows, start=1):
        yield Row(values, f"{where}, row {number}")
