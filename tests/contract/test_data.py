"""`layerskip data`: what the model will see, on stdout, with nothing left behind."""

import json
from pathlib import Path

import pytest
import yaml

from tests.support.runs import cli, write_corpus
from tests.support.saved_models import save_model
from tests.support.tokenizers import llama
from tests.support.topv2_folders import DOMAINS, write_folder

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def data(tmp_path, monkeypatch, capsys):
    """Run the verb on a small corpus; its standard streams."""
    (tmp_path / "notes.jsonl").write_text(
        "".join(json.dumps({"text": f"note {number} says that blocks may be skipped"}) + "\n" for number in range(90))
        + "{broken\n"
    )
    config = {
        "model": {"config": {"class_path": "transformers.LlamaConfig", "init_args": {"vocab_size": 300}}},
        "data": {
            "class_path": "datamodules.TextCodeDataModule",
            "init_args": {
                "sources": {
                    "code": {"kind": "files", "path": str(write_corpus(tmp_path / "corpus")), "weight": 3.0},
                    "notes": {"kind": "jsonl", "path": str(tmp_path / "notes.jsonl")},
                },
                "seq_len": 32,
                "batch_size": 4,
                "vocab_size": 300,
                "cache_dir": str(tmp_path / "cache"),
            },
        },
        "trainer": {"max_steps": 10, "val_check_interval": 5, "num_nodes": 8, "devices": 8, "precision": "bf16-mixed"},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)

    def run(*arguments, status=0):
        assert cli(monkeypatch, "data", "--config", "config.yaml", *arguments) == status
        return capsys.readouterr()

    return run


def test_it_counts_what_the_stream_delivers(data, tmp_path):
    found = json.loads(data("--json", "--num_batches", "50").out)
    code, notes = found["sources"]["code"], found["sources"]["notes"]
    assert (code["asked"], notes["asked"]) == (0.75, 0.25)
    assert code["rows"] + notes["rows"] == 200
    assert code["rows"] == pytest.approx(150, abs=2)
    assert found["positions"] == 200 * 32
    assert found["packing_efficiency"] == pytest.approx(1.0, abs=0.02)
    assert (notes["skipped"], code["skipped"]) == (notes["seen"] // 91, 0)  # one in each pass
    assert notes["skipped"] > 0
    assert notes["tokens"] / notes["documents"] < 32 < code["tokens"] / code["documents"]
    assert notes["bytes"] > notes["tokens"]
    assert found["peak_memory_mib"] > 50
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "config.yaml", "corpus", "notes.jsonl"}


def test_it_shows_shares_speed_and_a_row_with_its_boundaries(data):
    shown = data().out
    assert "asked" in shown
    assert "75.0%" in shown
    assert "packing efficiency" in shown
    assert "--- tokens 0.." in shown


def test_it_shows_a_parse_as_the_tokenizer_of_the_model_that_is_continued_begins_and_ends_it(data, tmp_path):
    model = save_model(tmp_path / "model", tokenizer=llama(add_eos_token=True), max_length=512)
    topv2 = {"class_path": "datamodules.TOPv2DataModule", "init_args": {"path": str(write_folder(tmp_path / "topv2"))}}
    topv2["init_args"] |= {"domains": list(DOMAINS), "seq_len": 256, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "more.yaml").write_text(
        json.dumps({"model": {"config": None, "pretrained": str(model)}, "data": topv2})
    )
    shown = data("--config", "more.yaml", "--num_batches", "1", "--check_resume").out
    row = shown.partition("loss on")[2].splitlines()[1]
    assert row.startswith("<s> ")
    assert "the same batches" in shown
    assert row.endswith(" ]")  # its end of text is predicted, no token of the row; and none of the padding


def test_a_cache_of_states_is_filled_to_the_size_that_is_planned(data, tmp_path, monkeypatch, capsys):
    model, cache = save_model(tmp_path / "model", num_layers=3), tmp_path / "states"
    sources = {"code": {"kind": "files", "path": str(tmp_path / "corpus")}}
    (tmp_path / "small.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"config": None, "pretrained": str(model), "exit_blocks": {"exits": {2: 1, 1: 0}}},
                "data": {
                    "init_args": {
                        "corpus": {
                            "init_args": {
                                "sources": sources,
                                "seq_len": 32,
                                "validation_share": 0.3,
                                "validation_rows": 2,
                            }
                        },
                        "num_tokens": 1000,
                        "cache_dir": str(cache),
                    },
                },
            }
        )
    )
    options = ("--config", str(CONFIGS / "data/cached_states.yaml"), "--config", "small.yaml")
    arguments = ("plan", "--config", "config.yaml", *options, "--json")
    assert cli(monkeypatch, *arguments) == 0
    planned = (found := json.loads(capsys.readouterr().out))["cache"]
    assert found["exit_blocks"]["pass_flops"] == 0 < found["exit_blocks"]["pass_flops_per_token"]
    assert not cache.exists()
    captured = data(*options, "--json", "--num_batches", "2", "--check_resume")
    found = json.loads(captured.out)
    assert found["positions"] == 2 * 8 * 32
    assert found["resumed"]["identical"]
    size = sum(file.stat().st_size for file in cache.glob("*.safetensors"))
    assert planned["bytes"] < size < planned["bytes"] + 1000  # of headers
    assert planned["num_states"] == 3
    message = f"caching 3 states of each of {planned['tokens']:,} tokens: 0."
    assert message in captured.err
    assert f"cached: {planned['tokens']:,} of {planned['tokens']:,} tokens, " in captured.err
    for extra, allowed in (
        (["--data.num_tokens", "0"], "data.num_tokens: got 0, allowed [1, inf)"),
        (["--data.exit_layers", "[3]"], "data.exit_layers: got [3], allowed 1..2 for a 3-layer model"),
    ):
        assert cli(monkeypatch, *arguments, *extra) == 2
        assert allowed in capsys.readouterr().err
    assert "cache_dir: got " in data(*options, "--data.exit_layers", "[2]", status=2).err


@pytest.mark.parametrize("workers", [0, 2])
def test_it_shows_that_the_stream_resumes_exactly(data, workers):
    found = json.loads(data("--json", "--check_resume", "--num_batches", "30", f"--data.num_workers={workers}").out)
    assert found["resumed"]["identical"]
    assert 0 < found["resumed"]["seconds"] < 60
    assert "the same batches" in data("--check_resume", "--num_batches", "3").out


def test_packing_can_be_compared_before_training(data):
    found = json.loads(data("--json", "--data.packing", "best_fit").out)
    assert 0.5 < found["packing_efficiency"] < 0.98


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_batches", "0"], "num_batches: got 0, allowed [1, inf)"),
        (["--data.seq_len", "1"], "data.init_args.seq_len: got 1, allowed [2, inf)"),
        (
            ["--data.seq_len", "4096"],
            "data.init_args.seq_len: got 4096, allowed 1..2048, the model's max_position_embeddings",
        ),
        (["--model.config.init_args.hidden_act", "foo"], "model.config.init_args.hidden_act: got 'foo', allowed gelu"),
        (
            ["--data.vocab_size", "310"],
            "model.config.init_args.vocab_size: got 300, allowed >= 310, the tokenizer's size",
        ),
        (["--data.sources.notes.field", "body"], "source 'notes'"),
        (["--data.max_bad_share", "0.001"], "source 'notes': 1 of 91 records are bad"),
        (
            ["--data.seq_len", "x"],
            "data.seq_len: got x, allowed int (a whole number)\n(options: layerskip data --help)",
        ),
        (["--seq_len", "8"], "seq_len: unknown key"),
        (["--num_batches", "x"], "num_batches: got x, allowed int (a whole number)\n(options: layerskip data --help)"),
    ],
)
def test_a_mistake_is_told_in_one_message(data, arguments, message):
    err = data(*arguments, status=2).err
    assert message in err
    assert "layerskip fit" not in err


def test_held_out_prompts_are_written_for_tuning_and_benchmarking(data, tmp_path):
    options = ("--num_prompts", "4", "--prompt_length", "6", "--data.validation_share", "0.3")
    for _ in range(2):  # a second call finds what it would write
        said = data("--prompts", "prompts.jsonl", *options)
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 4 < 2 * len(set(prompts))  # of two sources
    held_out = [path.read_text() for path in (tmp_path / "corpus").rglob("*.py")]
    held_out += [f"note {number} says that blocks may be skipped" for number in range(90)]
    assert all(any(text.startswith(prompt) for text in held_out) for prompt in prompts)
    assert said.out == "4 held-out prompts of 6 tokens: prompts.jsonl\n"


def test_prompts_that_were_there_stay_unless_told_otherwise_also_on_a_full_disk(data, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("the ones before")
    said = data("--prompts", "prompts.jsonl", "--data.validation_share", "0.3", status=2).err
    assert "prompts: got 'prompts.jsonl', allowed a new file; --overwrite true replaces prompts.jsonl" in said

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("app.whole_file.os.fsync", full)
    options = ("--prompts", "prompts.jsonl", "--overwrite", "true", "--data.validation_share", "0.3")
    assert "No space left" in data(*options, status=2).err
    assert (tmp_path / "prompts.jsonl").read_text() == "the ones before"


def test_prompts_that_cannot_be_written_are_told(data):
    assert "prompts: got 'nowhere/prompts.jsonl'" in data("--prompts", "nowhere/prompts.jsonl", status=2).err
