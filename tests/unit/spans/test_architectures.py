"""Each architecture, in every form that weights come in: logits as transformers' own, or a refusal by name."""

import re
from itertools import cycle
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from app.errors import ConfigError
from app.model.config_check import _POST_PROCESSING
from app.model.early_exit import EarlyExitModel
from app.model_files import loading
from app.model_files.open import load_config, load_for_decoding, load_pretrained
from app.spans.decoder import SUPPORTED_MODEL_TYPES, SpanDecoder
from app.spans.functional_block import FUNCTIONAL_MODEL_TYPES
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import byte_level

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
ARCHITECTURES: dict[str, tuple[str, dict[str, object]]] = {
    "llama 1 and 2": ("llama", {"num_key_value_heads": 4}),
    "llama 3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama 3.2": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 16}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "arcee": ("arcee", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, sliding": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2, sliding, tied": ("qwen2", {**SLIDING, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {"sliding_window": 5}),
    "phi3, partial rotation": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 5}),
    "granite without scaled logits": (
        "granite",
        {"logits_scaling": 1.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
}
DECODABLE = [name for name, (kind, _) in ARCHITECTURES.items() if kind in SUPPORTED_MODEL_TYPES]
SUSPICIOUS = re.compile(r"(?:config|self|model)\.(\w*(?:cap|scal|multiplier|unpadded)\w*)")
TOKENS = torch.randint(1, 250, (2, 24), generator=torch.Generator().manual_seed(3))


def make_model(kind: str, **extra: object) -> PreTrainedModel:
    settings: dict[str, object] = {
        "vocab_size": len(byte_level()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = AutoConfig.for_model(kind, **(settings | extra))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms, too, or their loss would not show
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    return model.eval()


def save(model: PreTrainedModel, folder: Path, form: str) -> str:
    if form == "lightning":
        return write_checkpoint(folder / "run.ckpt", model, byte_level())
    model.save_pretrained(folder, max_shard_size="20KB" if form == "sharded" else "1GB")
    byte_level().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) == 1 or form == "sharded"
    return str(folder)


@pytest.mark.parametrize(
    ("name", "form"),  # a form is read alike for all, and each form has tied and untied weights among these
    list(zip(ARCHITECTURES, cycle(["single", "sharded", "lightning"]), strict=False)),
)
@torch.no_grad()
def test_the_model_in_training_has_transformers_logits_bit_for_bit(name: str, form: str, tmp_path: Path) -> None:
    kind, extra = ARCHITECTURES[name]
    model = make_model(kind, **extra)
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    expected = model(TOKENS, position_ids=positions, use_cache=False).logits
    path = save(model, tmp_path, form)
    assert load_config(path).to_dict()["model_type"] == kind
    loaded = load_pretrained(path)
    assert list(loaded.state_dict()) == list(model.state_dict())
    early = EarlyExitModel(loaded)
    for training in (False, True):
        loaded.train(training)
        hidden = early.hidden_by_exit(TOKENS, positions, [3])
        assert torch.equal(early.head(hidden[3]), expected)
    next(loaded.get_decoder().layers[2].parameters()).data.mul_(1.01)
    assert not torch.equal(early.head(early.hidden_by_exit(TOKENS, positions, [3])[3]), expected)


@pytest.mark.parametrize("name", DECODABLE)
@torch.no_grad()
def test_decoding_has_transformers_logits(name: str, tmp_path: Path) -> None:
    kind, extra = ARCHITECTURES[name]
    model = make_model(kind, **extra)
    loaded, _ = load_for_decoding(save(model, tmp_path, "single"), dtype=None)
    expected = model(TOKENS[:1], use_cache=False).logits
    assert torch.equal(loaded(TOKENS[:1], use_cache=False).logits, expected)
    decoder = SpanDecoder(loaded)
    cache = decoder.new_cache(capacity=24)
    pieces = TOKENS[:1].split([9, 1, 14], dim=1)
    hidden = [decoder.run_blocks(decoder.embed(piece), start=0, stop=3, cache=cache) for piece in pieces]
    torch.testing.assert_close(decoder.unembed(torch.cat(hidden, dim=1)), expected, rtol=1e-4, atol=1e-4)


def test_all_types_that_decode_are_among_these() -> None:
    assert {ARCHITECTURES[name][0] for name in DECODABLE} == set(SUPPORTED_MODEL_TYPES) >= FUNCTIONAL_MODEL_TYPES


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
        (
            "phi3",
            {
                "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
                "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            },
        ),
    ],
)  # fmt: skip
def test_rope_that_changes_as_text_grows_trains_and_is_refused_in_decoding(
    kind: str, rope: dict[str, object], tmp_path: Path
) -> None:
    model = make_model(kind, rope_parameters=rope)
    path = save(model, tmp_path, "single")
    early, positions = EarlyExitModel(load_pretrained(path)), torch.arange(24).expand_as(TOKENS)
    with torch.no_grad():
        expected = model(TOKENS, position_ids=positions, use_cache=False).logits
        assert torch.equal(early.head(early.hidden_by_exit(TOKENS, positions, [3])[3]), expected)
    with pytest.raises(ConfigError, match=f"rope_type: got '{rope['rope_type']}', allowed default"):
        SpanDecoder(load_for_decoding(path, dtype=None)[0])


@pytest.mark.parametrize(
    ("kind", "extra", "name"),
    [
        ("gemma2", {"head_dim": 8}, "gemma2 with final_logit_softcapping 30.0"),
        (
            "gemma3_text",
            {"head_dim": 8, "final_logit_softcapping": 1.0},
            "gemma3_text with final_logit_softcapping 1.0",
        ),
        ("granite", {"logits_scaling": 8.0}, "granite with logits_scaling 8.0"),
        ("cohere", {}, "cohere with logit_scale 0.0625"),
    ],
)
def test_a_head_that_does_more_than_multiply_is_refused_by_name_before_weights_are_read(
    kind: str, extra: dict[str, object], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(make_model(kind, **extra), tmp_path, "single")
    monkeypatch.setattr(loading, "MODEL_FOR_CAUSAL_LM_MAPPING", None)
    for refusing in (load_config, load_pretrained, lambda path: load_for_decoding(path, dtype=None)):
        with pytest.raises(ConfigError, match=re.escape(f"got '{name}', allowed a model whose logits are")):
            refusing(path)


def test_the_table_of_post_processing_holds_every_setting_that_a_head_in_transformers_has() -> None:
    found: dict[str, str] = {}
    names = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(name, str)}
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for name, body in re.findall(r"^class (\w+)\b(.*?)(?=^\S|\Z)", file.read_text("utf-8"), re.M | re.S):
            if name in names:
                forward = body.partition("    def forward(")[2].partition("\n    def ")[0]
                found |= dict.fromkeys(SUSPICIOUS.findall(forward), name)
    assert {"final_logit_softcapping", "logits_scaling", "logit_scale"} <= set(found)  # so it does see them
    unknown = set(found) - set(_POST_PROCESSING) - {"logit_softcap"}  # a module made of final_logit_softcapping
    assert {name: found[name] for name in unknown} == {}
