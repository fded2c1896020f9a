import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from app.errors import ConfigError
from app.model.cpu import products
from app.spans.attention_masks import attention_mask
from app.spans.decoder import SUPPORTED_MODEL_TYPES, SpanDecoder
from app.spans.functional_block import FUNCTIONAL_MODEL_TYPES
from tests.support.tiny_models import tiny_llama

_VOCAB = 61
_EXTRA: dict[str, list[dict[str, object]]] = {  # settings of each type beyond the default ones
    "llama": [{"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}],
    "mistral": [{"sliding_window": 5}, {"sliding_window": None}],
    "phi3": [{"sliding_window": 5}],
    "qwen2": [{"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}],
    "qwen3": [{"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "head_dim": 16}],
    "smollm3": [{"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5}],
}
_CASES = [(kind, extra) for kind in SUPPORTED_MODEL_TYPES for extra in [{}, *_EXTRA.get(kind, [])]]


def _model(kind: str, **extra: object) -> PreTrainedModel:
    settings: dict[str, object] = {
        "vocab_size": _VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(settings | extra)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5.0)
    return model.eval()


def _tokens(length: int) -> torch.Tensor:
    return torch.randint(1, _VOCAB, (1, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def _by_spans(decoder: SpanDecoder, tokens: torch.Tensor, pieces: list[int], split: int) -> torch.Tensor:
    """Logits of `tokens` fed in pieces, blocks 0..split before the others, from a capacity that is too small."""
    cache, logits = decoder.new_cache(capacity=2), []
    for piece in tokens.split(pieces, dim=1):
        hidden = decoder.run_blocks(decoder.embed(piece), start=0, stop=split, cache=cache)
        hidden = decoder.run_blocks(hidden, start=split, stop=decoder.num_layers, cache=cache)
        logits.append(decoder.unembed(hidden))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("kind", "extra"), _CASES, ids=lambda value: value if isinstance(value, str) else str(len(value))
)
def test_logits_equal_the_models_own_forward_in_prefill_single_steps_and_verification(
    kind: str, extra: dict[str, object]
) -> None:
    model = _model(kind, **extra)
    decoder, tokens = SpanDecoder(model), _tokens(20)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    assert bool(decoder._blocks) == (kind in FUNCTIONAL_MODEL_TYPES)
    for pieces, split in (([20], 1), ([1] * 20, 2), ([7, 1, 4, 1, 7], 1), ([3, 8, 9], 2)):
        torch.testing.assert_close(_by_spans(decoder, tokens, pieces, split), expected, rtol=1e-4, atol=1e-4)


def test_the_parity_tolerance_notices_a_missing_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = _model("llama"), _tokens(20)
    expected = _by_spans(SpanDecoder(model), tokens, [7, 13], 1)
    monkeypatch.setattr(
        "app.spans.decoder.attention_mask", lambda _, queries_BT, **__: torch.zeros(1, 1, queries_BT.shape[1], 1)
    )
    assert not torch.allclose(_by_spans(SpanDecoder(model), tokens, [7, 13], 1), expected, atol=1e-1)


def _mask(starts: list[int], *, num_new: int, window: int | None = None, first: int = 0) -> list[list[float]] | None:
    """What the first sequence's, or all sequences', new positions see, as 1 and 0."""
    queries_BT = torch.tensor(starts)[:, None] + torch.arange(num_new)
    mask = attention_mask(starts, queries_BT=queries_BT, window=window, first=first, like=torch.zeros(1))
    return None if mask is None else mask.exp().flatten(0, 2).tolist()


def test_masks_are_explicit_only_where_sdpa_needs_them() -> None:
    assert _mask([9], num_new=1) is None
    assert _mask([0, 0], num_new=9) is None
    assert _mask([2], num_new=1, window=3) is None
    assert _mask([9], num_new=1, window=3, first=7) is None
    assert _mask([2], num_new=2) == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert _mask([2], num_new=2, window=2) == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert _mask([2], num_new=2, window=2, first=1) == [[1, 1, 0], [0, 1, 1]]
    assert _mask([2, 1], num_new=1) == [[1, 1, 1], [1, 1, 0]]
    assert _mask([4, 3], num_new=1, window=2, first=2) == [[0, 1, 1], [1, 1, 0]]


def test_a_truncated_cache_continues_exactly_like_a_fresh_one() -> None:
    decoder, tokens = SpanDecoder(tiny_llama(num_layers=3)), _tokens(12)
    with torch.no_grad():
        used, fresh = decoder.new_cache(capacity=16), decoder.new_cache(capacity=16)
        decoder.run_blocks(decoder.embed(tokens[:, :8]), start=0, stop=3, cache=fresh)
        decoder.run_blocks(decoder.embed(tokens[:, :8]), start=0, stop=3, cache=used)
        decoder.run_blocks(decoder.embed(_tokens(5)), start=0, stop=3, cache=used)  # rejected drafts
        decoder.run_blocks(decoder.embed(_tokens(2)), start=0, stop=1, cache=used)  # blocks filled unevenly
        used.truncate([8])
        after = [decoder.run_blocks(decoder.embed(tokens[:, 8:]), start=0, stop=3, cache=c) for c in (used, fresh)]
    assert torch.equal(after[0], after[1])


def test_layers_whose_class_was_swapped_for_a_subclass_are_driven_alike() -> None:
    plain = tiny_llama(num_layers=3)
    swapped = copy.deepcopy(plain)
    for layer in swapped.model.layers:
        layer.__class__ = type("Swapped", (type(layer),), {})
    ours, theirs = (_by_spans(SpanDecoder(model), _tokens(9), [4, 5], 2) for model in (swapped, plain))
    assert torch.equal(ours, theirs)


def test_driving_a_model_changes_no_parameter_buffer_or_mode() -> None:
    model = tiny_llama(num_layers=2)
    before = copy.deepcopy(dict(model.named_buffers()) | model.state_dict())
    _by_spans(SpanDecoder(model), _tokens(9), [4, 5], 1)
    after = dict(model.named_buffers()) | model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(tensor.is_inference() for tensor in after.values())


def test_a_model_in_training_mode_is_refused_and_not_switched() -> None:
    model = tiny_llama(num_layers=2)
    model.model.layers[1].train()
    with pytest.raises(ConfigError, match=r"training mode.*model\.eval\(\)"):
        SpanDecoder(model).new_cache(capacity=4)
    assert model.model.layers[1].training


def test_an_unsupported_type_is_named_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"model_type: got 'gemma2', allowed .*llama"):
        SpanDecoder(_model("gemma2", head_dim=8))


def test_a_head_with_post_processing_is_refused() -> None:
    model = tiny_llama(num_layers=2, tied=False)
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    with pytest.raises(ConfigError, match="lm_head: got 'Sequential'"):
        SpanDecoder(model)


def test_eager_attention_and_ropes_that_rewrite_buffers_are_refused() -> None:
    eager = tiny_llama(num_layers=2)
    eager.config._attn_implementation = "eager"
    with pytest.raises(ConfigError, match="attn_implementation"):
        SpanDecoder(eager)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ConfigError, match="rope_type: got 'dynamic'"):
        SpanDecoder(_model("llama", rope_parameters=rope))


def test_drafts_are_scored_among_the_ids_of_the_draft_vocabulary_alone() -> None:
    decoder = SpanDecoder(_model("llama").eval())
    entering = torch.randn(2, 3, 32)
    with torch.no_grad():
        whole = decoder.unembed(entering, exit_layer=1)
        decoder.use_draft_vocabulary([7, 2])
        logits = decoder.draft_logits(entering, exit_layer=1)
    assert decoder.draft_vocabulary == (7, 2)
    assert decoder.draft_ids is not None
    assert decoder.draft_ids.tolist() == [2, 7]
    torch.testing.assert_close(logits, whole[..., [2, 7]])


@pytest.mark.parametrize("ids", [None, [7, 2]])
def test_drafts_take_the_head_as_one_that_is_often_read(ids: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_LEAST_ELEMENTS", 1)
    decoder = SpanDecoder(_model("llama").eval())
    decoder.use_draft_vocabulary(ids)
    monkeypatch.setattr(products, "swapped_product", lambda *_: pytest.fail("swapped"))
    with torch.no_grad():
        decoder.draft_logits(torch.zeros(1, 1, 32), exit_layer=1)
        with pytest.raises(pytest.fail.Exception, match="swapped"):
            decoder.unembed(torch.zeros(1, 1, 32), exit_layer=1)
