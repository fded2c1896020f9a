"""`layerskip lens` in this process, on tiny models."""

import json

import pytest

from app.generation.model import load
from tests.support.runs import cli
from tests.support.saved_models import save_model, write_prompts
from tests.support.tokenizers import byte_level

TEXTS = ["the end of", "x = 1\n\ty"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Models and prompts."""
    folder = tmp_path_factory.mktemp("lens")
    save_model(folder / "plain")
    save_model(folder / "trained", seed=1)
    save_model(folder / "deeper", num_layers=5)
    save_model(folder / "foreign", tokenizer=byte_level(vocab_size=300))
    write_prompts(folder / "prompts.jsonl", TEXTS)
    (folder / "empty.jsonl").write_text("\n")
    return folder


@pytest.fixture
def lens(here, monkeypatch, capsys):
    """Run the verb; its standard streams."""

    def run(*arguments, status=0):
        monkeypatch.chdir(here)
        assert cli(monkeypatch, "lens", *arguments) == status
        return capsys.readouterr()

    return run


def test_two_models_are_compared_and_every_figure_is_in_the_json(here, lens):
    given = ["--model", "plain", "--model", "trained", "--prompts", "prompts.jsonl", "--max_new_tokens", "7"]
    said = lens(*given, "--output", "lens.json")
    told = json.loads((here / "lens.json").read_text())
    assert [model["name"] for model in told["models"]] == ["plain", "trained"]
    assert [prompt["prompt"] for prompt in told["prompts"]] == TEXTS
    for index, name in enumerate(("plain", "trained")):
        model = load(here / name)
        for text, prompt in zip(TEXTS, told["prompts"], strict=True):
            run = prompt["runs"][index]
            generated = model.generate(text, strategy="autoregressive", max_new_tokens=7)
            assert (run["tokens"], run["text"]) == (generated.tokens, generated.text)
            assert [tops[0] for tops in run["top_ids"][-1]] == generated.tokens
            layers = range(1, 5)
            assert run["needed"]["saturation_layers"] == [run["saturation"].count(layer) for layer in layers]
            assert {str(token) for row in run["top_ids"] for tops in row for token in tops} <= told[
                "token_texts"
            ].keys()
        saturation = [layer for prompt in told["prompts"] for layer in prompt["runs"][index]["saturation"]]
        assert told["models"][index]["needed"]["mean_saturation_layer"] == sum(saturation) / 14
        assert told["models"][index]["tokens_rounded_otherwise"] == 0
    assert "Layers needed of 4, by 14 and 14 tokens" in said.out
    assert "json: lens.json" in said.out
    settings = {"prompts": "prompts.jsonl", "limit": 16, "max_new_tokens": 7, "exit_layers": None}
    assert told["settings"] == settings


def test_a_page_and_a_picture_show_the_exits_that_are_asked_for(here, lens):
    for suffix, start in ((".html", b"<!doctype html>"), (".png", b"\x89PNG")):
        lens("--model", "plain", "--prompt", "<b>", "--output", f"one{suffix}", "--max_new_tokens", "3")
        assert (here / f"one{suffix}").read_bytes().startswith(start)
    given = ["--model", "plain", "--prompt", "null", "--max_new_tokens", "3", "--output", "all.json"]
    lens(*given)
    whole = json.loads((here / "all.json").read_text())
    lens(*given, "--exit_layers", "[2, 4]", "--overwrite", "true")
    some = json.loads((here / "all.json").read_text())
    assert [row["label"] for row in some["models"][0]["rows"]] == ["2", "4"]
    assert some["prompts"][0]["runs"][0]["kl"] == whole["prompts"][0]["runs"][0]["kl"][1::2]
    assert some["models"][0]["needed"] == whole["models"][0]["needed"]
    assert whole["prompts"][0]["prompt"] == "null"


def test_every_prompt_that_is_given_is_looked_at(here, lens):
    (here / "options.yaml").write_text("model: absent\nprompt: [first, 'null']\nmax_new_tokens: 2\n")
    given = ["--config", "options.yaml", "--model", "plain", "--output", "several.json", "--overwrite", "true"]
    for more, prompts in ([], ["first", "null"]), (["--prompt", "x", "--prompt", "y"], ["x", "y"]):
        lens(*given, *more)
        told = json.loads((here / "several.json").read_text())
        assert [prompt["prompt"] for prompt in told["prompts"]] == prompts
        assert [model["name"] for model in told["models"]] == ["plain"]


def test_its_help_names_types_in_words(lens):
    assert "at 0x" not in lens("--help").out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output", "x.pdf"], "output: got '.pdf', allowed .html | .json | .png"),
        (["--output", "absent/x.png"], "output: got 'absent/x.png', allowed a .png file in a folder that exists"),
        (["--prompt", ""], "prompt: got '', allowed at least one character; or prompts, a file of them"),
        (["--prompts", "prompts.jsonl"], "prompts: got 'prompts.jsonl', allowed either prompt or prompts, not both"),
        (["--prompt", "word " * 99], "prompt 2: got '495 tokens', allowed 1 to 95 tokens"),
        (["--exit_layers", "[1, 5]"], "exit_layers: got [1, 5], allowed one or several of 1..4; 4 is the full model"),
        (["--exit_layers", "[]"], "exit_layers: got [], allowed one or several of 1..4"),
        (["--max_new_tokens", "0"], "max_new_tokens: got 0, allowed [1, inf)"),
        (["--model", "deeper"], "model: got 'deeper', allowed a second model of 4 blocks, like the first; it has 5"),
        (["--model", "foreign"], "model: got 'foreign', allowed a model with the first model's tokenizer; "),
        (["--model", "absent/x"], "model: got 'absent/x', allowed"),
        (["--model", "plain", "--model", "plain"], "allowed one model, or two to compare"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(here, lens, options, said):
    before = {*here.iterdir()}
    given = ["--model", "plain", "--prompt", "x", "--max_new_tokens", "2", "--output", "new.html", *options]
    printed = lens(*given, status=2)
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert {*here.iterdir()} == before


def test_prompts_that_are_empty_or_too_long_are_told_by_their_location(here, lens):
    given = ["--model", "plain", "--output", "new.html"]
    assert "empty.jsonl holds no prompt" in lens(*given, "--prompts", "empty.jsonl", status=2).err
    write_prompts(here / "long.jsonl", ["x", "word " * 99])
    assert "long.jsonl: prompt 2: got '495 tokens'" in lens(*given, "--prompts", "long.jsonl", status=2).err
    assert "prompt: got None, allowed at least one character; or prompts" in lens(*given, status=2).err
