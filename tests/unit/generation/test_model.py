"""The Python API: `from app import load`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import app
from app import LayerSkipModule, load
from app.errors import ConfigError
from tests.support.checkpoints import write_checkpoint
from tests.support.saved_models import save_model
from tests.support.tiny_models import tiny_llama
from tests.support.tokenizers import byte_level

PROMPT = "the end of"
DRAFTED = {"strategy": "self_speculative", "exit_layer": 2, "num_draft_tokens": 3}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def model(path):
    return load(Path(path))


@pytest.fixture(scope="module")
def expected(model):
    """The continuation by transformers."""
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return model.model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()


def test_all_strategies_give_the_continuation_of_transformers(model, expected, path):
    plain = model.generate(PROMPT, strategy="autoregressive", max_new_tokens=20)
    assert plain.tokens == expected
    assert plain.text == model.tokenizer.decode(expected)
    for options in (DRAFTED, {"strategy": "draft_model", "draft_model": path, "num_draft_tokens": 2}):
        drafted = model.generate(PROMPT, max_new_tokens=20, fall_back=False, **options)
        assert (drafted.tokens, drafted.strategy, drafted.lossless) == (expected, options["strategy"], True)
        assert drafted.drafted > 0
    assert (drafted.acceptance_rate, plain.acceptance_rate) == (1.0, None)  # a model drafts well for itself
    for exit_layer, is_all in ((1, False), (model.num_layers, True)):
        left = model.generate(PROMPT, max_new_tokens=20, strategy="early_exit", exit_layer=exit_layer)
        assert (left.lossless, left.tokens == expected) == (is_all, is_all)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_a_list_gives_each_text_what_it_gets_alone(model, batch_size):
    texts = [PROMPT, "x = 1", "then more, and more of it"]
    together = model.generate(texts, batch_size=batch_size, max_new_tokens=9, **DRAFTED)
    assert [one.prompt for one in together] == texts
    assert [one.text for one in together] == [model.generate(text, max_new_tokens=9, **DRAFTED).text for text in texts]


def test_sampling_depends_on_the_seed_alone(model):
    texts = [model.generate(PROMPT, temperature=1.0, seed=seed, max_new_tokens=20).text for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_the_pieces_of_a_stream_come_round_by_round_and_make_up_the_text(model):
    pieces = model.stream(PROMPT, max_new_tokens=20, **DRAFTED)
    first = next(pieces)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    rest = list(pieces)
    assert first
    assert len(rest) > 2
    assert first + "".join(rest) == model.generate(PROMPT, max_new_tokens=20, **DRAFTED).text


def test_a_run_is_loaded_to_decode_and_to_train(tmp_path):
    network = tiny_llama(vocab_size=330, max_length=96)
    checkpoint = write_checkpoint(tmp_path / "last.ckpt", network, byte_level())
    decoded = load(checkpoint)
    module = LayerSkipModule.load_from_checkpoint(checkpoint, seed=3)
    for name, weight in network.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], weight), name
    assert module.seed == 3
    assert LayerSkipModule.load_from_checkpoint(checkpoint, map_location="meta").model.device.type == "meta"
    ids = decoded.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    trained = module.eval().model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert decoded.generate(PROMPT, strategy="autoregressive", max_new_tokens=8).tokens == trained.tolist()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"exit_layer": 9}, "exit_layer: got 9"),
        ({"max_new_tokens": -1}, "max_new_tokens: got -1"),
        ({"seed": -1}, "seed: got -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0"),
        ({"batch_size": 0}, "batch_size: got 0"),
    ],
)
def test_an_option_out_of_range_is_refused_by_its_name(model, options, named):
    with pytest.raises(ConfigError, match=named):
        model.generate(PROMPT, **options)


def test_prompts_that_cannot_be_continued_are_refused(model):
    with pytest.raises(ConfigError, match="prompt: got \\[\\]"):
        model.generate([])
    with pytest.raises(ConfigError, match="prompt 2: got"):
        model.generate([PROMPT, ""])
    with pytest.raises(TypeError, match=r"unknown option temprature; the options are .*temperature"):
        model.generate(PROMPT, temprature=1.0)


def test_the_api_is_all_that_the_package_exports_and_costs_no_import():
    for name in app.__all__:
        assert getattr(app, name).__name__ == name
    assert dir(app) == sorted(app.__all__)
    with pytest.raises(AttributeError, match="no attribute 'decode'"):
        app.decode  # noqa: B018
    code = "import sys, app; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
