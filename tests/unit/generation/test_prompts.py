import json
from pathlib import Path

import pytest

from app.errors import ConfigError, DataError
from app.generation.prompts import encode_prompts, read_prompts

GOOD = b'{"prompt": "one"}\n'


def _file(root: Path, content: bytes) -> str:
    path = root / "prompts.jsonl"
    path.write_bytes(content)
    return str(path)


def _words(text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
    """A tokenizer: an id for each word."""
    return {"input_ids": [len(word) for word in text.split()]}


def test_prompts_come_in_the_order_of_the_file_and_other_keys_do_not_matter(tmp_path: Path) -> None:
    path = _file(tmp_path, b'{"prompt": "b", "task": 1}\n{"prompt": "a\\n  c"}\n{"prompt": "b"}')
    assert read_prompts(path) == ["b", "a\n  c", "b"]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_mistakes(tmp_path: Path) -> None:
    assert read_prompts(_file(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r\n   \n" + '{"prompt": "zwö"}\r\n'.encode())) == [
        "one",
        "zwö",
    ]


def test_nothing_after_the_limit_is_read(tmp_path: Path) -> None:
    path = _file(tmp_path, GOOD + GOOD + b"not json\n")
    assert read_prompts(path, limit=2) == ["one", "one"]
    with pytest.raises(DataError, match="line 3"):
        read_prompts(path, limit=3)


BAD_LINES = [
    (b"{oops", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'"one"', "got str, allowed an object"),
    (b'{"text": "one"}', "no \"prompt\", only ['text']"),
    (b'{"prompt": 3}', "is int, allowed a string"),
    (b'{"prompt": null}', "is NoneType"),
    (b'{"prompt": ["one"]}', "is list"),
    (b'{"prompt": ""}', "is empty"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    (b'{"prompt": "\\ud800"}', "not Unicode"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_a_bad_line_is_named_with_its_number_in_the_file(tmp_path: Path, line: bytes, message: str) -> None:
    path = _file(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError) as raised:
        read_prompts(path)
    assert f"{path}, line 3" in str(raised.value)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 300


def test_a_file_without_prompts_and_one_that_cannot_be_read_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(_file(tmp_path, b"\n\n"))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_prompts(str(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_prompts(str(tmp_path))
    with pytest.raises(ConfigError, match="limit: got 0"):
        read_prompts(_file(tmp_path, GOOD), limit=0)


def test_prompts_become_the_tokenizers_ids() -> None:
    assert encode_prompts(["a bc", "def"], _words, max_length=3) == [[1, 2], [3]]  # type: ignore[arg-type]


@pytest.mark.parametrize(("texts", "message"), [(["a", "a b c"], "prompt 2: got '3"), ([" "], "prompt: got '0")])
def test_a_prompt_without_tokens_or_with_too_many_is_named_by_its_number(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message} tokens', allowed 1 to 2"):
        encode_prompts(texts, _words, max_length=3)  # type: ignore[arg-type]


def test_what_json_lines_files_are_made_of_is_read_back(tmp_path: Path) -> None:
    texts = ['quotes " and \\ and \u2028', "\ttab", "emoji 😀", "null"]
    assert read_prompts(_file(tmp_path, "\n".join(json.dumps({"prompt": t}) for t in texts).encode())) == texts
