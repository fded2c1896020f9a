"""The model as lm-evaluation-harness sees it: its tasks from every exit, on tasks and files that the test writes."""

import json
import shutil
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import yaml

from app.errors import ConfigError
from app.model.exit_block import exit_blocks_of
from app.model_files.exit_blocks import EXIT_BLOCKS_FILE, StoredExitBlocks
from app.model_files.open import load_for_decoding
from tests.support.checkpoints import write_checkpoint
from tests.support.runs import cli
from tests.support.saved_models import MAX_LENGTH, save_model
from tests.unit.model_files.test_gguf import write_gguf

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]  # the harness's own warnings

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
NUM_LAYERS, EXIT = 4, 2
WORDS = ["the", "end", "of", "the", "END,", "then", "more", "x", "=", "1", "naïve", "café", "Grüße", "aus", "Köln"]
# Each has rows that the test writes, and its scores; contexts are of very different lengths, some beyond the model's.
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["naïve", "END, then more", "x"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["e", " ,", "\n"], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    },
}
_SHARED = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0, "target_delimiter": " "}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files, each with local rows."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": " ".join((WORDS * 9)[i % 7 : i % 7 + 1 + i * 8]), "answer": i % 3} for i in range(14)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        files = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **_SHARED, **task, "dataset_kwargs": files}))
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "hf", num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def first_blocks(directory, tmp_path_factory):
    """A model of the first blocks alone, as `layerskip export` writes it."""
    folder = tmp_path_factory.mktemp("first") / "exit"
    with pytest.MonkeyPatch.context() as patch:
        given = ["--model", str(directory), "--exit_layer", str(EXIT), "--output_dir", str(folder)]
        assert cli(patch, "export", *given) == 0
    return folder


def evaluate(model, tasks, *names):
    """Scores by task and metric, and what was said for each row, by the harness's own loop."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = evaluate(model, manager.load([*(names or TASKS)]), bootstrap_iters=0, verbosity="ERROR")
    said = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
    return found["results"], said


def ours(directory, **model_args):
    from app.evaluation.harness import LayerSkipLM

    return LayerSkipLM(str(directory), **model_args)


def theirs(directory, **model_args):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(directory), device="cpu", **model_args)


@pytest.fixture(scope="module")
def whole(tasks, directory):
    """What the whole model scores and says."""
    return evaluate(ours(directory, batch_size=4), tasks)


def test_full_depth_scores_what_the_harness_scores_of_the_same_model(tasks, directory, whole):
    assert whole == evaluate(theirs(directory, batch_size=4), tasks)
    alone = evaluate(ours(directory), tasks)
    assert alone == evaluate(theirs(directory), tasks)
    assert alone[1]["writing"] == whole[1]["writing"]


def test_an_exit_scores_what_a_model_of_its_blocks_scores(tasks, directory, first_blocks, whole):
    model = ours(directory, batch_size=4, exit_layer=EXIT)
    found = evaluate(model, tasks)
    assert found == evaluate(theirs(first_blocks, batch_size=4), tasks)
    assert all(found[1][name] != whole[1][name] for name in TASKS)
    info = model.get_model_info()
    assert (info["strategy"], info["exit_layer"], info["lossless"]) == ("early_exit", EXIT, False)


def test_an_exit_with_blocks_of_its_own_scores_what_its_export_scores(tasks, directory, tmp_path, monkeypatch, whole):
    folder, out = shutil.copytree(directory, tmp_path / "hf"), tmp_path / "exit"
    model = load_for_decoding(str(folder), dtype=None)[0]
    blocks = exit_blocks_of(model, {EXIT: [EXIT]})
    torch.nn.init.uniform_(blocks[str(EXIT)].decoder.norm.weight)
    stored = StoredExitBlocks(blocks.state_dict(), {EXIT: [EXIT]}, None)
    (folder / EXIT_BLOCKS_FILE).write_bytes(stored.as_file(model.state_dict()))
    exported = ["--model", str(folder), "--exit_layer", str(EXIT), "--output_dir", str(out)]
    assert cli(monkeypatch, "export", *exported) == 0
    found = evaluate(ours(folder, batch_size=4, exit_layer=EXIT), tasks)
    assert found == evaluate(theirs(out, batch_size=4), tasks)
    assert found[1]["writing"] != whole[1]["writing"]


def test_an_exit_scores_the_same_from_every_kind_of_file(directory, tmp_path):
    model, tokenizer = load_for_decoding(str(directory), dtype=None)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    sources = [
        directory,
        write_checkpoint(tmp_path / "run.ckpt", model, tokenizer),
        write_gguf(tmp_path / "model.gguf", model, tokenizer),
    ]
    said = [
        ours(source, exit_layer=EXIT)._loglikelihood_tokens([(("", ""), [9, 40, 41], [50, 60])]) for source in sources
    ]
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize(
    "drafting",
    [
        {"strategy": "self_speculative", "exit_layer": EXIT, "num_draft_tokens": 3, "fall_back": False},
        {"strategy": "self_speculative", "exit_layer": 1, "n_gram_match": 2, "batch_size": 1},
        {"strategy": "n_gram"},
        {"strategy": "self_speculative", "exit_layer": EXIT, "engine": "static", "threads": 1},
    ],
)
def test_drafting_changes_no_score_and_no_text(tasks, directory, whole, drafting):
    model = ours(directory, **({"batch_size": 4} | drafting))
    assert evaluate(model, tasks, "writing")[1]["writing"] == whole[1]["writing"]
    assert model.model is model.loaded.model  # likelihoods are the whole model's
    assert model.get_model_info()["lossless"]


def test_contexts_are_cut_and_outputs_end_where_the_harness_says(tasks, directory, whole):
    model = ours(directory)
    lengths = [len(model.tok_encode(json.loads(line)["text"])) for line in (tasks / "rows.jsonl").open()]
    assert min(lengths) < 8
    assert max(lengths) > MAX_LENGTH
    texts = [text for ((text,),) in whole[1]["writing"]]
    assert not any(stop in text for text in texts for stop in TASKS["writing"]["generation_kwargs"]["until"])
    assert len({len(text) for text in texts}) > 2


def test_the_entry_point_is_the_model_and_the_command_line_tells_of_a_mistake_in_a_line(directory, monkeypatch, capsys):
    from lm_eval.api.registry import get_model

    from app.evaluation import harness

    declared = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["lm_eval.models"]
    assert EntryPoint("layerskip", declared["layerskip"], "lm_eval.models").load() is harness.LayerSkipLM

    def the_harness(arguments):
        given = {"batch_size": 2, "max_batch_size": None, "device": "cuda:0"}  # its own default, here without a GPU
        return get_model("layerskip").create_from_arg_string(arguments, given)

    found = []
    monkeypatch.setattr(harness, "cli_evaluate", lambda: found.append(the_harness(f"pretrained={directory}")))
    assert harness.main() == 0
    assert type(found[0]) is harness.LayerSkipLM
    assert (found[0].batch_size, found[0].device.type, found[0].exit_layer) == (2, "cpu", NUM_LAYERS)
    monkeypatch.setattr(harness, "cli_evaluate", lambda: the_harness(f"pretrained={directory},exit_layer=9"))
    assert harness.main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: exit_layer: got 9, allowed [1, 4]")


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({}, "pretrained: got None, allowed a Hugging Face directory"),
        ({"pretrained": "absent"}, "pretrained: got 'absent', allowed a Hugging Face directory"),
        ({"exit_layers": 2}, "model_args: got 'exit_layers', allowed pretrained | strategy | exit_layer | "),
        ({"exit_layer": "two"}, "exit_layer: got 'two', allowed an integer"),
        ({"threads": "two"}, "threads: got 'two', allowed an integer"),
        ({"engine": "quick"}, "engine: got 'quick', allowed dynamic | static"),
        ({"exit_layer": 0}, r"exit_layer: got 0, allowed \[1, 4\]"),
        (
            {"exit_layer": 2, "strategy": "autoregressive"},
            "exit_layer: got 2, allowed only with strategy early_exit | ",
        ),
        ({"strategy": "early_exit"}, "exit_layer: got None, allowed a number of blocks"),
        ({"strategy": "guess"}, "strategy: got 'guess', allowed autoregressive | early_exit | "),
        ({"strategy": "self_speculative", "num_draft_tokens": 0}, "num_draft_tokens: got 0"),
        ({"dtype": "int8"}, "dtype: got 'int8', allowed auto | float32"),
        ({"device": "cuda:1"}, "device: got 'cuda:1', allowed auto | cpu"),
    ],
)
def test_model_args_that_are_wrong_are_one_message(directory, model_args, message):
    from app.evaluation.harness import LayerSkipLM

    given = {"pretrained": str(directory)} | model_args if model_args else {}
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        LayerSkipLM(**given)
