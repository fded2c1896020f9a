import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.errors import ConfigError, DataError
from app.topv2.semantic_parse import TARGET_FORMATS, TargetFormat
from datamodules.loading.tokenizers import load_tokenizer
from datamodules.topv2_rows import store as topv2_store
from datamodules.topv2_rows.store import StoreSettings, TaskStore, open_store
from tests.support.tokenizers import llama
from tests.support.topv2_folders import DOMAINS, rows_of, write_folder

DEFAULTS = StoreSettings(
    path="",
    domains=DOMAINS,
    spis=None,
    prompt_template="{utterance} =>",
    target_format="parse",
    special_tokens=False,
    tokenizer=None,
    vocab_size=330,
    max_bad_share=0.0,
    seq_len=64,
    batch_size=2,
    validation_rows=2,
    num_workers=0,
    seed=0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("topv2") / "topv2")


def build(folder: Path, cache: Path, **settings: Any) -> TaskStore:
    return open_store(replace(DEFAULTS, path=str(folder), **settings), cache_dir=cache)


def plain(store: TaskStore) -> dict[str, Any]:
    """Everything in it, comparable."""
    arrays = {
        f"{split}/{name}": getattr(examples, name).tolist()
        for split, examples in store.examples.items()
        for name in ("tokens", "offsets", "prompt_lengths", "sources", "lengths")
    }
    references = {split: examples.references for split, examples in store.examples.items()}
    return arrays | references | {"tokenizer": store.tokenizer.backend_tokenizer.to_str(), "key": store.key}


@pytest.mark.parametrize("target_format", ["parse", "json"])
@pytest.mark.parametrize("special_tokens", [False, True])
def test_prompt_and_target_are_tokenised_apart_and_decode_to_their_texts(
    folder: Path, tmp_path: Path, target_format: TargetFormat, special_tokens: bool
) -> None:
    store = build(folder, tmp_path, target_format=target_format, special_tokens=special_tokens)
    tokenizer = store.tokenizer
    rows = [row for domain, seed in zip(DOMAINS, (2, 12), strict=True) for row in rows_of(domain, count=20, seed=seed)]
    del rows[37:]  # the second domain has three rows fewer
    examples = store.examples["test"]
    assert len(examples.references) == len(rows) == len(examples.lengths)
    for index, (domain, utterance, parse) in enumerate(rows):
        tokens, length = examples.example(index), examples.prompt_lengths[index]
        target = TARGET_FORMATS[target_format].encode(parse)
        assert tokenizer.decode(tokens[:length]) == f"{utterance} =>"
        assert tokens[:length].tolist() == examples.prompt(index) == tokenizer(f"{utterance} =>")["input_ids"]
        assert tokenizer.decode(tokens[length:-1], skip_special_tokens=True) == f" {target}"
        assert tokens[-1] == tokenizer.eos_token_id
        assert examples.references[index] == target
        assert DOMAINS[examples.sources[index]] == domain
        assert examples.lengths[index] == len(tokens) - 1


@pytest.mark.parametrize(
    ("target_format", "expected"),
    [
        (
            "parse",
            {" [IN:CREATE_REMINDER", " [IN:GET_WEATHER", " [SL:DATE_TIME", " [SL:LOCATION", " [SL:PERSON_REMINDED"}
            | {" [SL:TODO", " ]"},
        ),
        (
            "json",
            {' {"IN:CREATE_REMINDER":', ' {"IN:GET_WEATHER":', '{"SL:DATE_TIME":', '{"SL:LOCATION":', "}"}
            | {'{"SL:PERSON_REMINDED":', '{"SL:TODO":'},
        ),
    ],
)
def test_special_tokens_are_the_labels_of_the_training_rows_and_the_closing_bracket(
    folder: Path, tmp_path: Path, target_format: TargetFormat, expected: set[str]
) -> None:
    store = build(folder, tmp_path, target_format=target_format, special_tokens=True)
    added = {token.content for token in store.tokenizer.added_tokens_decoder.values() if not token.special}
    assert added == expected
    assert len(store.tokenizer) <= DEFAULTS.vocab_size
    in_order = [store.tokenizer.convert_tokens_to_ids(token) for token in sorted(expected - {"}"})]  # } is a byte
    assert in_order == sorted(in_order)  # the same in every process
    bracket = "[" if target_format == "parse" else "{"
    assert not any(bracket in token[1:] or token == f"Ġ{bracket}" for token in set(store.tokenizer.get_vocab()) - added)
    examples, ids = store.examples["train"], {store.tokenizer.convert_tokens_to_ids(token) for token in expected}
    num_nodes = len(re.findall("IN:|SL:", examples.references[0]))
    assert sum(token in ids for token in examples.example(0)) == 2 * num_nodes
    without = build(folder, tmp_path, target_format=target_format)
    assert examples.lengths.mean() < 0.8 * without.examples["train"].lengths.mean()


def test_a_vocabulary_without_room_for_the_special_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size: got 263, allowed >= 264: every byte, and 7 special tokens"):
        build(folder, tmp_path, special_tokens=True, vocab_size=263)
    assert len(build(folder, tmp_path, special_tokens=True, vocab_size=264).tokenizer) == 264


@pytest.mark.parametrize(("target_format", "token"), [("parse", " [SL:PLACE2"), ("json", '{"SL:PLACE2":')])
def test_held_out_rows_give_the_tokenizer_nothing(
    folder: Path, tmp_path: Path, target_format: TargetFormat, token: str
) -> None:
    def vocabulary(path: Path) -> dict[str, int]:
        store = build(path, tmp_path, special_tokens=True, target_format=target_format)
        return dict(store.tokenizer.get_vocab())

    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    for split in ("eval", "test"):
        file = changed / f"weather_{split}.tsv"
        file.write_text(file.read_text("utf-8").replace("SL:LOCATION", "SL:PLACE2"), "utf-8")
    assert vocabulary(changed) == vocabulary(folder)
    (changed / "weather_train.tsv").write_bytes((changed / "weather_test.tsv").read_bytes())  # negative control
    assert token in vocabulary(changed)


def test_the_prompt_is_what_the_template_makes_of_the_utterance(folder: Path, tmp_path: Path) -> None:
    store = build(folder, tmp_path, prompt_template="parse: {utterance} ->")
    utterance = rows_of(DOMAINS[0], count=1, seed=2)[0][1]
    assert store.tokenizer.decode(store.examples["test"].prompt(0)) == f"parse: {utterance} ->"
    assert "parse" in store.tokenizer.get_vocab()  # learnt from the prompts


def test_building_twice_gives_the_same_and_so_does_the_cache(folder: Path, tmp_path: Path) -> None:
    one = build(folder, tmp_path / "caches" / "one", special_tokens=True)
    (file,) = (tmp_path / "caches" / "one").iterdir()
    written = file.stat().st_mtime_ns
    assert plain(build(folder, tmp_path / "caches" / "one", special_tokens=True)) == plain(one)
    assert file.stat().st_mtime_ns == written
    assert plain(build(folder, tmp_path / "two", special_tokens=True)) == plain(one)


def test_an_interrupted_build_leaves_no_store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, content: Any) -> int:
        self.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(folder, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("position", [0, 100, 5_000, -100])
def test_a_damaged_cache_is_built_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, position: int
) -> None:
    whole = build(folder, tmp_path)
    (file,) = tmp_path.iterdir()
    raw = bytearray(file.read_bytes())
    raw[position] ^= 255
    for content in (bytes(raw), raw[: len(raw) // 2], b""):
        file.write_bytes(content)
        caplog.clear()
        assert plain(build(folder, tmp_path)) == plain(whole)
        assert "is damaged: preparing it again" in caplog.text
        assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "change",
    [
        {"domains": DOMAINS[::-1]},
        {"spis": 10},
        {"prompt_template": "parse: {utterance}"},
        {"target_format": "json"},
        {"special_tokens": True},
        {"vocab_size": 320},
    ],
)
def test_the_key_is_of_all_that_the_content_depends_on(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    assert build(folder, tmp_path, **change).key != build(folder, tmp_path).key


def test_another_version_of_the_code_builds_anew(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = build(folder, tmp_path).key
    monkeypatch.setattr(topv2_store, "_CODE_VERSION", topv2_store._CODE_VERSION + 1)
    assert build(folder, tmp_path).key != key


def test_the_key_is_of_the_files_not_of_their_path(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    store = build(folder, tmp_path / "cache")
    assert build(moved, tmp_path / "cache").key == store.key
    file = moved / "weather_test.tsv"
    file.write_text(file.read_text().replace("weather in", "the weather in"))
    assert build(moved, tmp_path / "cache").key != store.key


def test_bad_rows_stop_the_build(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    with (broken / "reminder_eval.tsv").open("a") as file:
        file.write("reminder\tcall\t[IN:CALL\n")
    with pytest.raises(DataError, match=r"reminder_eval.tsv:22: .*no ] for IN:CALL"):
        build(broken, tmp_path / "cache")
    assert len(build(broken, tmp_path / "cache", max_bad_share=0.1).examples["eval"].references) == 37


def test_a_given_tokenizer_is_used_and_gets_the_special_tokens(folder: Path, tmp_path: Path) -> None:
    given = build(folder, tmp_path).tokenizer
    given.save_pretrained(tmp_path / "given")
    store = build(folder, tmp_path, tokenizer=str(tmp_path / "given"))
    assert plain(store) | {"key": 0} == plain(build(folder, tmp_path)) | {"key": 0}
    assert build(folder, tmp_path, tokenizer=str(tmp_path / "given"), vocab_size=320).key == store.key
    given.save_pretrained(tmp_path / "moved")
    assert build(folder, tmp_path, tokenizer=str(tmp_path / "moved")).key == store.key
    build(folder, tmp_path, vocab_size=320).tokenizer.save_pretrained(tmp_path / "other")
    assert build(folder, tmp_path, tokenizer=str(tmp_path / "other")).key != store.key
    with_labels = build(folder, tmp_path, tokenizer=str(tmp_path / "given"), special_tokens=True)
    assert len(with_labels.tokenizer) == len(given) + 7
    assert len(load_tokenizer(str(tmp_path / "given"))) == len(given)


def test_a_row_begins_as_the_tokenizer_begins_a_text_and_ends_once(folder: Path, tmp_path: Path) -> None:
    tokenizer = llama(add_eos_token=True)
    tokenizer.save_pretrained(tmp_path / "given")
    examples = build(folder, tmp_path, tokenizer=str(tmp_path / "given")).examples["test"]
    for index, (_, utterance, parse) in enumerate(rows_of(DOMAINS[0], count=20, seed=2)):
        begun, ended = (tokenizer(text)["input_ids"] for text in (f"{utterance} =>", f" {parse}"))
        assert examples.prompt(index) == begun[:-1]
        assert examples.example(index).tolist() == [*begun[:-1], *ended[1:]]
