"""`layerskip write`: a model's own text, to train on."""

import fcntl
import json
from pathlib import Path

import pytest

from datamodules.readers import open_reader
from datamodules.readers.sources import Source
from tests.support.runs import cli
from tests.support.saved_models import save_model, write_prompts

_PROMPTS = ["the end", "x = 1", "more of it"]


@pytest.fixture
def write(tmp_path, monkeypatch, capsys):
    """Runs the verb; gives its status, the lines written and what it said."""
    model = save_model(tmp_path / "model")
    output = tmp_path / "own.jsonl"

    def run(*options):
        given = ["write", "--model", str(model), "--output", str(output), "--max_new_tokens", "9", *options]
        status = cli(monkeypatch, *given)
        captured = capsys.readouterr()
        lines = output.read_text().splitlines() if output.exists() else []
        return status, [json.loads(line) for line in lines], captured.out + captured.err

    run.output, run.prompts = output, str(write_prompts(tmp_path / "prompts.jsonl", _PROMPTS))
    return run


def test_each_prompt_is_continued_at_each_temperature_and_the_texts_can_be_trained_on(write):
    status, lines, _ = write("--prompts", write.prompts, "--temperatures", "[0, 0.9]", "--batch_size", "2")
    assert status == 0
    assert [(line["prompt"], line["temperature"]) for line in lines] == [
        (p, t) for batch in (_PROMPTS[:2], _PROMPTS[2:]) for t in (0, 0.9) for p in batch
    ]
    assert all(line["text"].startswith(line["prompt"]) and line["text"] != line["prompt"] for line in lines)
    assert [line["text"] for line in lines[:2]] != [line["text"] for line in lines[2:4]]
    reader = open_reader(Source(kind="jsonl", path=str(write.output), name="own"), min_chunks=1)
    read = [record.text for chunk in range(reader.num_chunks) for record in reader.read(chunk)]
    assert sorted(read) == sorted(line["text"] for line in lines)


def test_no_batch_is_begun_after_the_time_limit(write):
    options = ["--prompts", write.prompts, "--temperatures", "[0, 1]", "--batch_size", "2"]
    assert len(write(*options, "--time_limit_seconds", "0")[1]) == 2
    assert len(write(*options)[1]) == 6


@pytest.mark.parametrize(
    ("lines", "more"),
    [(6, 0), (5, -1), (3, 9), (0, 0)],
    ids=["whole", "last line end", "within a batch", "empty"],
)
def test_an_interrupted_call_goes_on_to_the_same_file(write, lines, more):
    """A killed process had written whole lines, and some bytes after them."""
    options = ["--prompts", write.prompts, "--temperatures", "[0.9, 0]", "--batch_size", "2"]
    write(*options)
    whole = write.output.read_bytes()
    written = whole.splitlines(keepends=True)
    write.output.write_bytes(b"".join(written[:lines]) + b"".join(written[lines:])[:more])
    status, _, said = write(*options)
    assert (status, write.output.read_bytes()) == (0, whole)
    assert ("going on" in said) == (lines > 0)
    assert (": 6 of 6 texts, " in said) == (lines < 6)


def test_a_file_of_another_command_is_refused_and_left(write):
    write("--prompts", write.prompts, "--temperatures", "[0]")
    before = write.output.read_bytes()
    of_others = (["--temperatures", "[0, 1]"], ["--top_p", "0.5"], ["--batch_size", "1"])
    for options in (["--temperatures", "[0]", *each] for each in of_others):
        status, _, said = write("--prompts", write.prompts, *options)
        assert status == 2
        assert "output: got" in said
        assert "line 1 is of another model, prompt or option" in said
        assert write.output.read_bytes() == before
    write.output.write_text('"notes without a line break"')
    assert write("--prompts", write.prompts)[:2] == (2, ["notes without a line break"])


def test_prompts_of_a_corpus_begin_at_lines_of_documents_that_are_not_held_out(write, tmp_path):
    corpus = Path(tmp_path, "corpus")
    corpus.mkdir()
    for index in range(40):
        (corpus / f"{index}.txt").write_text("".join(f"{index} is line {n} of this text\n" for n in range(30)))
    status, lines, _ = write(
        "--corpus", str(corpus), "--num_prompts", "8", "--prompt_length", "6", "--temperatures", "[0]",
        "--held_out_share", "0.5",
    )  # fmt: skip
    assert (status, len(lines)) == (0, 8)
    documents = list(open_reader(Source(kind="files", path=str(corpus), name="c"), min_chunks=1).read(0))
    held_out = {document.text.split()[0] for document in documents if document.is_held_out(share=0.5)}
    assert 5 < len(held_out) < 35
    for line in lines:
        number, rest = line["prompt"].split(" ", 1)
        assert number.isdigit()
        assert number not in held_out
        assert "is line".startswith(rest[:7])
    again = write("--corpus", str(corpus), "--num_prompts", "8")
    assert again[0] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "prompts: got 'neither'"),
        (["--prompts", "FILE", "--corpus", "x"], "prompts: got 'both'"),
        (["--prompts", "FILE", "--temperatures", "[]"], "temperatures: got []"),
        (["--prompts", "FILE", "--temperatures", "[-1]"], "temperature: got -1"),
        (["--prompts", "FILE", "--batch_size", "0"], "batch_size: got 0"),
        (["--corpus", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_message(write, options, said):
    status, lines, message = write(*(write.prompts if option == "FILE" else option for option in options))
    assert (status, lines) == (2, [])
    assert said in message


def test_an_output_that_cannot_be_gone_on_with_is_refused_before_the_model_is_read(write, tmp_path, monkeypatch):
    monkeypatch.setattr("app.generation.loaded_model.load_decoder", lambda *_, **__: pytest.fail("the model was read"))
    for output in (tmp_path, tmp_path / "no folder" / "own.jsonl", "/dev/null"):
        status, _, said = write("--prompts", write.prompts, "--output", str(output))
        assert status == 2
        assert f"error: output: got '{output}', allowed a file" in said


def test_a_file_that_another_process_writes_is_refused_and_left(write):
    with write.output.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        status, lines, said = write("--prompts", write.prompts)
    assert (status, lines) == (2, [])
    assert f"output: got '{write.output}', allowed a file that no other process is writing" in said
