"""`layerskip adapt` on a tiny model: one command from a finished model to one that drafts for itself, untouched."""

import pytest
import torch

from app.cli.adapt_clock import _SHARES
from app.cli.adapt_settings import AdaptSettings
from app.cli.adaptation import Adaptation, _equal_weights
from app.errors import ConfigError
from app.generation.loaded_model import load_decoder
from app.generation.prompts import read_prompts
from app.model_files.open import load_pretrained
from tests.support.runs import TINY_EXIT_BLOCKS, adapt_here, cli, measure_costs_once
from tests.support.saved_models import save_model, write_prompts


@pytest.fixture
def adapt(folder, monkeypatch, capfd):
    """Runs the verb, whose own verbs run in this process, too; gives its status and what was said."""

    adapt_here(monkeypatch)
    measure_costs_once(monkeypatch)
    monkeypatch.chdir(folder)

    def run(*options, recipe="recipe.yaml"):
        given = [
            "--model",
            "model",
            "--output_dir",
            "out",
            "--recipe",
            recipe,
            "--hours",
            "0.01",
            "--max_new_tokens",
            "8",
        ]
        return cli(monkeypatch, "adapt", *given, *options), capfd.readouterr()

    return run


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", dtype=torch.bfloat16, tied=True)
    (tmp_path / "recipe.yaml").write_text(TINY_EXIT_BLOCKS)
    write_prompts(tmp_path / "prompts.jsonl", ["a prompt"])
    (corpus := tmp_path / "corpus").mkdir()
    for index in range(60):
        (corpus / f"{index}.txt").write_text("".join(f"{index} is line {n} of the text\n" for n in range(9)))
    return tmp_path


def test_one_command_adapts_a_model_goes_on_where_it_was_and_leaves_the_weights(adapt, folder, monkeypatch, caplog):
    options = ["--corpus", "corpus", "--exit_layer", "1"]
    monkeypatch.setattr("callbacks.run_logs._FEW_BLOCKS", 0)  # details are left out of the logs of deep models
    monkeypatch.setattr("app.cli.adaptation._PROBE_STEPS", "none")
    status, said = adapt(*options)
    assert status == 2
    assert "adapt: cache ended with status 2; the same command goes on from there" in said.err
    for name, less in (("_PROBE_STEPS", 2), ("_MOST_EPOCHS", 1)):
        monkeypatch.setattr(f"app.cli.adaptation.{name}", less)
    for step in ("tune", "benchmark"):
        monkeypatch.setitem(_SHARES, step, 0.02)
    status, said = adapt(*options, "--exit_layer", "2")
    assert status == 2
    assert "exit_layer: got 2, allowed 1 in work_dir out.work" in said.err
    written = (folder / "out.work" / "own.jsonl").read_bytes()
    status, said = adapt(*options)
    assert status == 0, said.err
    assert (folder / "out.work" / "own.jsonl").read_bytes() == written
    assert any(message.startswith("hours: 0.01 leave time or text for ") for message in caplog.messages)
    assert "out: adapted in " in said.out
    assert " minutes; 0.6 were asked for" in " ".join(said.out.split())
    assert any("the full model is bit-identical" in line and " yes " in line for line in said.out.splitlines())
    before, after = (load_pretrained(str(folder / name), dtype=None) for name in ("model", "out"))
    assert after.dtype == torch.bfloat16
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())
    assert load_decoder(str(folder / "out"), dtype="float32", device="cpu").decoder.own_exits == (1,)
    assert not _equal_weights("model", str(save_model(folder / "other", dtype=torch.bfloat16, tied=True, seed=1)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "prompts: got 'neither'"),
        (["--corpus", "corpus", "--prompts", "prompts.jsonl"], "prompts: got 'both'"),
        (["--corpus", "corpus", "--exit_layer", "4"], "exit_layer: got 4, allowed [1, 3]"),
        (["--corpus", "corpus", "--model", "shallow"], "exit_layer: got 1, allowed none in a model of one block"),
        (["--corpus", "corpus", "--hours", "0"], "hours: got 0"),
        (["--corpus", "nowhere"], "no folder or file 'nowhere'"),
        (["--prompts", "prompts.jsonl"], "prompts: got '1 prompts', allowed at least 8"),
        (
            ["--corpus", "corpus", "--output_dir", "model/"],
            "output_dir: got 'model/', allowed another directory than the model's",
        ),
        (["--corpus", "corpus", "--output_dir", "corpus"], "output_dir: got 'corpus', allowed a directory that is new"),
        (["--corpus", "corpus", "--output_dir", "/"], "output_dir: got '/', allowed a directory below the root"),
        (["--corpus", "corpus", "--recipe", "none.yaml"], "recipe: got 'none.yaml', allowed a config file"),
    ],
)
def test_mistakes_are_one_message_before_any_work(adapt, folder, options, told):
    save_model(folder / "shallow", num_layers=1)
    status, said = adapt(*options)
    assert status == 2
    assert told in said.err
    assert not [*folder.glob("*.work")]


def test_a_quarter_of_given_prompts_is_held_out_in_halves(folder):
    texts = [f"prompt {index}" for index in range(12)]
    given = AdaptSettings(prompts=str(write_prompts(folder / "prompts.jsonl", texts)))
    adaptation = Adaptation.begin(str(folder / "model"), "out", folder / "work", given)
    assert adaptation.exit_layer == 1
    for _ in range(2):  # made, then found
        learn, tune, test = (read_prompts(str(file)) for file in adaptation._prompts)
        assert (learn, tune, test) == (texts[:9], texts[9:10], texts[10:])
    few = AdaptSettings(prompts=str(write_prompts(folder / "few.jsonl", texts[:7])))
    with pytest.raises(ConfigError, match="at least 8"):
        Adaptation.begin(str(folder / "model"), "out", folder / "work2", few)
