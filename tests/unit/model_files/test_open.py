import json
import shlex
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from app.checkpoints.weights import HF_CONFIG_KEY, TOKENIZER_KEY
from app.errors import CheckpointError, ConfigError, UserError
from app.model_files import loading
from app.model_files import open as opening
from app.model_files.open import load_config, load_for_decoding, load_pretrained
from datamodules.loading.tokenizers import train_byte_level_bpe
from tests.support.checkpoints import write_checkpoint
from tests.support.tiny_models import tiny_llama

TEXT = "def double(x): return 2 * x"


def make_tokenizer():
    return train_byte_level_bpe([TEXT] * 30, vocab_size=300)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=300)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "whole"
    model.save_pretrained(folder, max_shard_size="40KB")  # several files and their index
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def directory(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def set_config(directory, **settings):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def set_index(directory, file):
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(list(content["weight_map"])[:1], file)
    index.write_text(json.dumps(content))


def write_lightning(path, model, **other):
    return write_checkpoint(path, model, make_tokenizer(), **other)


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(60)[None]).logits


def test_directory_gives_the_models_logits_in_eval_mode(whole, model):
    loaded, tokenizer = load_for_decoding(str(whole), dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(tiny_llama(vocab_size=300, seed=1)))
    assert not loaded.training
    assert tokenizer(TEXT)["input_ids"] == make_tokenizer()(TEXT)["input_ids"]


@pytest.mark.parametrize("tied", [True, False])
def test_lightning_checkpoint_gives_the_models_logits_in_eval_mode(tmp_path, tied):
    model = tiny_llama(vocab_size=300, tied=tied)
    loaded, tokenizer = load_for_decoding(write_lightning(tmp_path / "run.ckpt", model), dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert tokenizer(TEXT)["input_ids"] == make_tokenizer()(TEXT)["input_ids"]


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_no_dtype_means_the_checkpoints_own(tmp_path, own):
    tiny_llama(vocab_size=300).to(own).save_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    make_tokenizer().save_pretrained(tmp_path / "hf")
    for path in (str(tmp_path / "hf"), write_lightning(tmp_path / "run.ckpt", model)):
        loaded, _ = load_for_decoding(path, dtype=None)
        assert loaded.dtype == own
        assert torch.equal(logits(loaded), logits(model))
        assert load_for_decoding(path, dtype=torch.float16)[0].dtype == torch.float16


def test_weights_trained_in_another_dtype_than_the_config_says_keep_theirs(tmp_path):
    model = tiny_llama(vocab_size=300)
    model.config.dtype = torch.bfloat16  # of the directory that training continued from
    assert load_for_decoding(write_lightning(tmp_path / "run.ckpt", model), dtype=None)[0].dtype == torch.float32


def test_the_files_decide_on_the_dtype_and_not_the_config(directory):
    set_config(directory, dtype="bfloat16")
    assert load_for_decoding(str(directory), dtype=None)[0].dtype == torch.float32


def remove(*patterns):
    return lambda directory: [file.unlink() for pattern in patterns for file in directory.glob(pattern)]


def pickle_weights(directory):
    remove("*.safetensors*")(directory)
    torch.save({}, directory / "pytorch_model.bin")


def truncate(pattern):
    def cut(directory):
        file = sorted(directory.glob(pattern))[0]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return cut


def set_generation(directory, **settings):
    (directory / "generation_config.json").write_text(json.dumps(settings))


def set_dtype(dtype):
    def change(directory):
        file = sorted(directory.glob("*.safetensors"))[0]
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)

    return change


NO_TOKENIZER = "a model with a tokenizer"
BROKEN_DIRECTORIES = {
    "no config": (remove("config.json"), ConfigError, "model: got .*; there is no config.json in this"),
    "config cut": (truncate("config.json"), ConfigError, r"config\.json: not a valid JSON file"),
    "field of wrong type": (
        lambda d: set_config(d, hidden_size="x"),
        ConfigError,
        r"config\.json: hidden_size: got 'x', allowed int$",
    ),
    "field of none of its types": (
        lambda d: set_config(d, eos_token_id=[[1]]),
        ConfigError,
        r"a model that can be built; config\.json: eos_token_id: got \[\[1\]\], allowed int \| list\[int\] \| null$",
    ),
    "unknown model": (lambda d: set_config(d, model_type="x"), ConfigError, "model type `x`"),
    "not a decoder": (lambda d: set_config(d, model_type="t5"), ConfigError, "T5Config"),
    "no weights": (remove("*.safetensors*"), ConfigError, "safetensors weights; there are none"),
    "pickled weights": (pickle_weights, ConfigError, "safetensors weights; there are pickled ones only"),
    "adapter": (lambda d: (d / "adapter_config.json").touch(), ConfigError, "merge the adapter into its model first"),
    "code of its own": (
        lambda d: set_config(d, model_type="its_own", auto_map={"AutoConfig": "its.Config"}),
        ConfigError,
        r"it brings Python code of its own \(auto_map in config\.json\), .* never run: take a model of an architecture",
    ),
    "generation that cannot be": (
        lambda d: (d / "generation_config.json").write_text('{"max_new_tokens": 0}'),
        CheckpointError,
        r"generation_config\.json: contradicts itself \(.max_new_tokens. must be greater than 0",
    ),
    **{
        f"generation's {name} {value}": (
            lambda d, name=name, value=value: set_generation(d, **{name: value}),
            CheckpointError,
            rf"generation_config\.json: .*{name}|generation_config\.json: contradicts itself \(.*int",
        )
        for name, values in {
            "eos_token_id": ([[1]], "x", -5, 10**9, 300, 1.5, True, {}, [0, None]),
            "max_new_tokens": ("x",),
            "watermarking_config": (1,),
        }.items()
        for value in values
    },
    "end of text that the config implies": (
        lambda d: (remove("generation_config.json")(d), set_config(d, eos_token_id=[300])),
        CheckpointError,
        r"config\.json: eos_token_id: got \[300\], allowed a token id from 0 to 299",
    ),
    "unknown activation": (
        lambda d: set_config(d, hidden_act="foo"),
        ConfigError,
        r"config\.json: hidden_act: got 'foo', allowed .*silu",
    ),
    **{
        f"config's {name} {value}": (
            lambda d, name=name, value=value: set_config(d, **{name: value}),
            ConfigError,
            rf"config\.json: {name}: got",
        )
        for name, value in {
            "num_hidden_layers": 10**7,
            "num_key_value_heads": 0,
            "num_labels": 10**12,
            "sliding_window": 1.5,
            "attention_dropout": -1.0,
            "text_config": "x",
            "rms_norm_eps": 1e30,
        }.items()
    },
    "rotary positions of factor 0": (
        lambda d: set_config(d, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}),
        ConfigError,
        r"config\.json: factor: got 0\.0",
    ),
    **{
        f"length of the tokenizer's texts {value!r}": (
            lambda d, value=value: (d / "tokenizer_config.json").write_text(
                json.dumps(json.loads((d / "tokenizer_config.json").read_text()) | {"model_max_length": value})
            ),
            ConfigError,
            rf"tokenizer_config\.json: model_max_length: got {value!r}, allowed a number, at least 1",
        )
        for value in ("x", -3)
    },
    "padding beyond the vocabulary": (
        lambda d: set_config(d, pad_token_id=10**12),
        ConfigError,
        r"config\.json: .*Padding_idx must be within",
    ),
    **{
        f"weights {dtype}": (
            set_dtype(getattr(torch, dtype)),
            CheckpointError,
            f"embed_tokens.weight has dtype {kind},",
        )
        for dtype, kind in {"int64": "I64", "bool": "BOOL", "complex64": "C64", "float8_e5m2": "F8_E5M2"}.items()
    },
    "quantized": (
        lambda d: set_config(d, quantization_config={"quant_method": "gptq", "bits": 4}),
        ConfigError,
        "allowed a model whose weights are not quantized",
    ),
    "block too many": (
        lambda d: set_config(d, num_hidden_layers=3),
        CheckpointError,
        r"9 weights of blocks are not in a model .*model\.layers\.3\.",
    ),
    "shard missing": (remove("*-00002-of-*"), CheckpointError, r"1 of \d+ weight files are missing: \['model-00002-of"),
    "index cut": (truncate("*.index.json"), CheckpointError, r"index\.json: damaged"),
    "index pointing elsewhere": (
        lambda d: set_index(d, "../copy/model-00001-of-00004.safetensors"),
        CheckpointError,
        r"index\.json: .*'\.\./copy/model-.*' is no file of this directory",
    ),
    "shard cut": (truncate("*.safetensors"), CheckpointError, "copy: the weights are damaged"),
    "shard a pointer": (
        lambda d: sorted(d.glob("*.safetensors"))[0].write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        CheckpointError,
        r"copy: the weights are damaged \(model-00001.*: a git-lfs pointer, .*: run git lfs pull\)",
    ),
    "other shapes": (
        lambda d: set_config(d, hidden_size=48),
        CheckpointError,
        r"38 weights do not fit, the first is model\.embed_tokens.* has shape \[300, 32\], the .* says \[300, 48\]",
    ),
    "block missing": (lambda d: set_config(d, num_hidden_layers=5), CheckpointError, r"9 weights .*model\.layers\.4\."),
    "no tokenizer": (remove("tokenizer*"), ConfigError, NO_TOKENIZER),
    "tokenizer's vocabulary missing": (remove("tokenizer.json"), ConfigError, NO_TOKENIZER),
    "tokenizer cut": (truncate("tokenizer.json"), ConfigError, f"{NO_TOKENIZER}.*its tokenizer cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN_DIRECTORIES)
def test_broken_directory_ends_in_one_error(directory, case):
    breakage, error, message = BROKEN_DIRECTORIES[case]
    load_for_decoding(str(directory), dtype=None)  # whole
    breakage(directory)
    with pytest.raises(error, match=message) as caught:
        load_for_decoding(str(directory), dtype=None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["directory", "file"])
def test_pickled_weights_are_refused_with_a_command_that_converts_them(directory, given):
    pickle_weights(directory)
    weights = tiny_llama(vocab_size=300).state_dict()
    torch.save(weights, directory / "pytorch_model.bin")
    with pytest.raises(ConfigError) as caught:
        load_for_decoding(str(directory if given == "directory" else directory / "pytorch_model.bin"), dtype=None)
    assert "can run code; where you trust them, convert them: python -c '" in str(caught.value)
    python, option, code = shlex.split(str(caught.value).partition("convert them: ")[2])
    assert (python, option) == ("python", "-c")
    exec(code, {})  # noqa: S102  # what a user would run
    loaded, _ = load_for_decoding(f"{directory}-safetensors", dtype=None)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in weights.items())


def test_weights_beside_the_model_are_left_out_with_a_warning(directory, model, caplog):
    save_file({"v_head.weight": torch.ones(2)}, directory / "model-00000-of-00001.safetensors")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["v_head.weight"] = "model-00000-of-00001.safetensors"
    index.write_text(json.dumps(content))
    assert torch.equal(logits(load_for_decoding(str(directory), dtype=None)[0]), logits(model))
    assert "1 weights are not in the model and are left out: ['v_head.weight']" in caplog.text


def test_weights_of_several_dtypes_are_converted_from_their_own(tmp_path):
    model = tiny_llama(vocab_size=300).bfloat16()
    model.model.norm.weight.data = torch.rand(32)  # in float32
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)


def test_generation_settings_come_with_a_directory(directory):
    settings = GenerationConfig(eos_token_id=[3, 5], assistant_early_exit=2, num_assistant_tokens=7)
    settings.save_pretrained(directory)
    loaded = load_pretrained(str(directory)).generation_config
    assert (loaded.eos_token_id, loaded.assistant_early_exit, loaded.num_assistant_tokens) == ([3, 5], 2, 7)


def test_hub_id_is_found_in_the_local_cache(whole, model, tmp_path, monkeypatch):
    commit = "0" * 40
    repository = tmp_path / "models--owner--tiny"
    shutil.copytree(whole, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loaded, tokenizer = load_for_decoding("owner/tiny", dtype=None)
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer(TEXT)["input_ids"] == make_tokenizer()(TEXT)["input_ids"]
    sorted((repository / "snapshots" / commit).glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="weight files are missing"):
        load_pretrained("owner/tiny")


def test_directory_whose_tokenizer_class_needs_no_files_is_refused_without_them(directory):
    remove("tokenizer*")(directory)
    set_config(directory, model_type="qwen2")  # transformers makes a tokenizer of one token of nothing
    with pytest.raises(ConfigError, match=NO_TOKENIZER):
        load_for_decoding(str(directory), dtype=None)


def test_an_architecture_needs_no_weights(directory, model):
    remove("*.safetensors*")(directory)
    loaded, saved = load_config(str(directory)).to_dict(), model.config.to_dict()
    assert [name for name in saved if loaded[name] != saved[name]] == ["_name_or_path"]


def test_training_refuses_missing_weights_too(directory):
    set_config(directory, num_hidden_layers=5)
    with pytest.raises(CheckpointError, match="9 weights of the model are missing"):
        load_pretrained(str(directory))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "no such file or directory"),
        ("./absent", "no such file or directory"),
        ("runs/absent/last.ckpt", "no such file or directory"),
        ("absent.ckpt", "no such file or directory"),
        ("absent.gguf", "no such file or directory"),
        ("models/absent", "no such file or directory"),  # as configs/experiment have it
        ("here/absent", "no such file or directory"),
        ("weights.safetensors", r"give its directory, where config\.json is: \."),
        ("weights.onnx", "files ending in '.onnx' are not known"),
        ("weights", "files without an ending are not known"),
    ],
)
def test_what_is_no_model_is_refused_with_what_is_allowed(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opening.AutoConfig, "from_pretrained", None)  # the hub is not asked
    (tmp_path / "here").mkdir()
    for file in ("weights.safetensors", "weights.onnx", "weights"):
        (tmp_path / file).touch()
    with pytest.raises(ConfigError, match=f"^draft_model: got '{name}', allowed a Hugging Face .*; {message}"):
        load_for_decoding(name, dtype=None, field="draft_model")


def test_hub_id_that_cannot_be_had_says_that_there_is_no_such_directory_either(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("We couldn't connect\nto the hub\nCheck your internet connection or see ...")

    monkeypatch.setattr(opening.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ConfigError, match=r"no such directory here, nor on the hub: We couldn't connect to the hub$"):
        load_for_decoding("owner/absent", dtype=None)


@pytest.mark.parametrize("kind", ["directory", "checkpoint"])
def test_tokenizer_with_ids_beyond_the_model_is_refused_with_both_numbers_before_weights_are_read(
    tmp_path, monkeypatch, kind
):
    largest = len(make_tokenizer()) - 1
    enough, too_few = (tiny_llama(vocab_size=size) for size in (largest + 1, largest))
    path = tmp_path / ("hf" if kind == "directory" else "run.ckpt")
    for model, fits in ((enough, True), (too_few, False)):
        if kind == "directory":
            model.save_pretrained(path)
            make_tokenizer().save_pretrained(path)
        else:
            write_lightning(path, model)
        if fits:
            load_for_decoding(str(path), dtype=None)
            continue
        monkeypatch.setattr(loading, "MODEL_FOR_CAUSAL_LM_MAPPING", None)
        with pytest.raises(ConfigError, match=rf"vocab_size \({largest}\); this tokenizer has ids up to {largest}:"):
            load_for_decoding(str(path), dtype=None)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({HF_CONFIG_KEY: None}, "not written by LayerSkipModule"),
        ({TOKENIZER_KEY: None}, "holds no tokenizer"),
        ({"state_dict": {}}, "weights of the model are missing"),
    ],
)
def test_lightning_checkpoint_that_lacks_something_is_refused(tmp_path, model, other, message):
    with pytest.raises(CheckpointError, match=message):
        load_for_decoding(write_lightning(tmp_path / "run.ckpt", model, **other), dtype=None)


def test_truncated_lightning_checkpoint_is_refused(tmp_path, model):
    path = tmp_path / "run.ckpt"
    write_lightning(path, model)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"run\.ckpt: truncated"):
        load_for_decoding(str(path), dtype=None)
