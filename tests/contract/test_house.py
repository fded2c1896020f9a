"""app/README.md: its recipes are followed on a copy of the tree, and the files that it names are there."""

import ast
import os
import re
import shutil
import sys
import tomllib
from multiprocessing import get_context
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOUSE = (ROOT / "app" / "README.md").read_text("utf-8")
PACKAGES = ("app", "callbacks", "datamodules", "tests")
NAMED = re.compile(r"`((?:app|callbacks|datamodules|configs|tests|docs)/[\w./-]+)`")

FOLLOWED = """
import json
import torch
from transformers import SeedOssConfig, SeedOssForCausalLM
from app import load
from app.layerskip.exit_weights import normalised_exit_weights
from app.layerskip.schedules import dropout_rates
from app.evaluation.rows import read_items
from app.evaluation.tasks import TASKS
from datamodules.readers import open_reader
from datamodules.readers.sources import Source
from tests.support.saved_models import save_model
from tests.support.tokenizers import byte_level

rates = dropout_rates(0, num_layers=5, max_dropout_rate=0.2, depth="square_root")
assert rates == tuple(0.2 * (layer / 4) ** 0.5 for layer in range(5)), rates
weights = normalised_exit_weights([2, 3, 5], num_layers=5, early_exit_scale=0.5, kind="square")
assert weights == {2: 0.5 / 18.5, 3: 2 / 18.5, 5: 16 / 18.5}, weights

from pathlib import Path
model = load(str(save_model(Path("llama"))))
plain = model.generate("the end", strategy="autoregressive", max_new_tokens=30)
for options in ({"strategy": "half"}, {"strategy": "self_speculative", "exit_layer": 1, "draft_policy": "halving"}):
    drafted = model.generate("the end", num_draft_tokens=4, max_new_tokens=30, fall_back=False, **options)
    assert drafted.tokens == plain.tokens and drafted.drafted > 0, options
assert drafted.drafted < 4 * drafted.rounds - 8  # fewer than the fixed policy

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=8)
config = SeedOssConfig(vocab_size=330, max_position_embeddings=96, num_key_value_heads=2, **sizes)
SeedOssForCausalLM(config).save_pretrained("other")
byte_level().save_pretrained("other")
other = load("other")
ids = other.tokenizer("the end", return_tensors="pt")["input_ids"]
expected = other.model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1]:].tolist()
assert other.generate("the end", max_new_tokens=20, exit_layer=2, num_draft_tokens=3).tokens == expected

row = {"support": "", "question": "Why?", "distractor1": "a", "distractor2": "b", "distractor3": "c"}
Path("sciq.jsonl").write_text(json.dumps(row | {"correct_answer": "d"}))
(item,) = read_items(TASKS["sciq"], "sciq.jsonl")
assert item.example[:3] == ("Question: Why?\\nAnswer:", (" a", " b", " c", " d"), 3), item

cells = [{"cell_type": "code", "source": ["x = 1\\n", "y = 2"]}, {"cell_type": "markdown", "source": "no"}]
Path("books").mkdir()
Path("books/good.ipynb").write_text(json.dumps({"cells": cells}))
Path("books/bad.ipynb").write_text("{}")
reader = open_reader(Source(kind="notebooks", path="books"), min_chunks=1)
records = [record for chunk in range(reader.num_chunks) for record in reader.read(chunk)]
assert sorted(getattr(record, "text", None) or record.reason for record in records) == [
    "not a notebook: 'cells'", "x = 1\\ny = 2"], records
"""


def hunks() -> list[tuple[str, str, str]]:
    """File, old text and new text of every change that the recipes ask for."""
    found = []
    for block in re.findall(r"```diff\n(.*?)```", HOUSE, re.DOTALL):
        for part in re.split(r"^# ", block, flags=re.MULTILINE)[1:]:
            file, _, changes = part.partition("\n")
            for hunk in re.split(r"\n{2,}", changes.strip("\n")):
                lines = hunk.split("\n")
                old, new = ("".join(line[1:] + "\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
                found.append((file, old, new))
    return found


def run_there(root, changed):
    """Use the packages of a copy, in a process that has loaded all others."""
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    os.chdir(root)
    exec(compile(FOLLOWED, "app/README.md", "exec"), {})  # noqa: S102 - ours
    used = {getattr(module, "__file__", None) for module in sys.modules.values()}
    assert {str(root / file) for file in changed} <= used


def test_the_recipes_work_when_they_are_followed(tmp_path):
    for room in PACKAGES:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    assert len({file for file, *_ in hunks()}) == 9
    for file, old, new in hunks():
        text = (tmp_path / file).read_text("utf-8")
        assert text.count(old) == 1, (file, old)
        (tmp_path / file).write_text(text.replace(old, new), "utf-8")
    whole = re.findall(r"```python\n# (\S+)\n(.*?)```", HOUSE, re.DOTALL)
    assert len(whole) == 2
    for file, code in whole:
        (tmp_path / file).write_text(code, "utf-8")
    child = get_context("fork").Process(target=run_there, args=(tmp_path, [file for file, *_ in hunks()]))
    child.start()
    child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize(
    "document",
    [
        "app/README.md",
        "CONTRIBUTING.md",
        "datamodules/README.md",
        "configs/README.md",
        "app/decoding/README.md",
        "app/layerskip/README.md",
        "docs/evaluation.md",
        "docs/results.md",
        "docs/long_runs.md",
        "docs/serving.md",
    ],
)
def test_every_file_that_a_document_names_is_there(document):
    missing = [name for name in NAMED.findall((ROOT / document).read_text("utf-8")) if not (ROOT / name).exists()]
    assert missing == []


def test_every_room_has_its_level_and_stands_in_the_picture():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    levels = next(contract for contract in contracts if contract["name"] == "the layers of the house")["layers"]
    rooms = {path.parent.name for path in (ROOT / "app").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "app").glob("[!_]*.py")}
    expected = {f"app.{name}" for name in rooms | files} | {"callbacks", "datamodules"}
    assert {name for level in levels for name in level.split(" | ")} == expected
    picture = HOUSE.partition("```mermaid")[2].partition("```")[0]
    assert [room for room in sorted(rooms) if f"app/{room}" not in picture] == []


def test_modules_have_a_test_of_their_name_or_say_where_it_is():
    """tests/unit mirrors the tree; a module that whole runs test names their file in its docstring."""
    missing = []
    for path in (path for room in ("app", "callbacks", "datamodules") for path in (ROOT / room).rglob("*.py")):
        folder = path.relative_to(ROOT / "app" if path.is_relative_to(ROOT / "app") else ROOT).parent
        mirrored = ROOT / "tests" / "unit" / folder / f"test_{path.stem}.py"
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        if not (path.stem.startswith("__") or mirrored.exists() or "test_" in docstring):
            missing.append(str(path.relative_to(ROOT)))
    assert len(missing) < 20, missing
