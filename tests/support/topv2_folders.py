"""A small made-up TOPv2: the official folder's layout, with two domains, and a datamodule over it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules import TOPv2DataModule

DOMAINS = ("reminder", "weather")
HEADER = "domain\tutterance\tsemantic_parse"

_TOWNS = ("boston", "oslo", "são paulo", "new york", "rome")
_TASKS = ("call mum", "buy milk and eggs", 'read " dune "', "walk the dog before it gets dark outside")

Fields = tuple[str, str, str]  # domain, utterance, parse


def weather_row(rng: np.random.Generator) -> Fields:
    town, day = rng.choice(_TOWNS), int(rng.integers(1, 1000))
    parse = f"[IN:GET_WEATHER weather in [SL:LOCATION {town} ] [SL:DATE_TIME in {day} days ] ]"
    return "weather", f"weather in {town} in {day} days", parse


def reminder_row(rng: np.random.Generator) -> Fields:
    task, hour = rng.choice(_TASKS), int(rng.integers(1, 1000))
    when = f"[SL:DATE_TIME at {hour} ]"
    parse = f"[IN:CREATE_REMINDER remind [SL:PERSON_REMINDED me ] to [SL:TODO {task} ] {when} ]"
    return "reminder", f"remind me to {task} at {hour}", parse


ROW_MAKERS = {"reminder": reminder_row, "weather": weather_row}


def rows_of(domain: str, *, count: int, seed: int) -> list[Fields]:
    rng = np.random.default_rng(seed)
    return [ROW_MAKERS[domain](rng) for _ in range(count)]


def write_tsv(file: Path, rows: Sequence[Sequence[str]], *, header: str = HEADER) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in [header, *map("\t".join, rows)]), encoding="utf-8")


def write_folder(folder: Path, *, train: int = 90, held_out: int = 20) -> Path:
    """All splits of the two domains, and their low-resource splits of 10 samples per intent and slot."""
    for number, domain in enumerate(DOMAINS):
        for place, (split, count) in enumerate([("train", train), ("eval", held_out), ("test", held_out)]):
            seed = 10 * number + place
            write_tsv(folder / f"{domain}_{split}.tsv", rows_of(domain, count=count - 3 * number, seed=seed))
        for split, count in (("train", 12), ("valid", 6)):
            file = folder / "low_resource_splits" / f"{domain}_{split}_10spis.tsv"
            rows = rows_of(domain, count=count, seed=100 + number)
            write_tsv(file, rows, header=HEADER.replace("semantic_parse", "seqlogical"))
    return folder


def small_topv2(folder: Path, **settings: Any) -> TOPv2DataModule:
    """Over the folder `folder / "topv2"`, which is made if need be."""
    if not (folder / "topv2").is_dir():
        write_folder(folder / "topv2")
    defaults: dict[str, Any] = {
        "path": str(folder / "topv2"),
        "domains": list(DOMAINS),
        "seq_len": 128,
        "batch_size": 8,
        "vocab_size": 330,
        "cache_dir": str(folder / "cache"),
    }
    return TOPv2DataModule(**(defaults | settings))
