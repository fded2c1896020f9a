"""Prompts longer than a window or a piece: the same logits, and memory and work in proportion to the prompt."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from app.spans import decoder as spans
from app.spans import functional_block
from app.spans.decoder import SpanDecoder
from app.spans.functional_block import needs_repeated_keys
from tests.unit.decoding.model_zoo import build

_WINDOW = 13
_WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "qwen2, second half": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3, in turns": (
        "qwen3",
        {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 16},
    ),
    "smollm3, unrotated": ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True}),
    "phi3 by modules": ("phi3", {}),
}


def _model(name: str, window: int = _WINDOW) -> PreTrainedModel:
    kind, extra = _WINDOWED[name]
    return build(kind, num_layers=4, seed=1, sliding_window=window, **extra)


def _tokens(length: int) -> Tensor:
    return torch.randint(0, 61, (1, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def _logits(decoder: SpanDecoder, tokens: Tensor, *, then: int = 0) -> Tensor:
    """Of a prompt through two spans of blocks, and of `then` tokens more, one by one."""
    cache, logits = decoder.new_cache(capacity=tokens.shape[1]), []
    for piece in tokens.split([tokens.shape[1] - then] + [1] * then, dim=1):
        hidden = decoder.run_blocks(decoder.embed(piece), start=0, stop=3, cache=cache)
        logits.append(decoder.unembed(decoder.run_blocks(hidden, start=3, stop=4, cache=cache)))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("piece", [_WINDOW, 40])
@pytest.mark.parametrize("name", _WINDOWED)
def test_logits_are_the_models_own_however_the_prompt_is_cut(
    name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "_PIECE", piece)
    model = _model(name)
    decoder = SpanDecoder(model)
    for length in (_WINDOW - 1, _WINDOW, _WINDOW + 1, 2 * piece - 1, 2 * piece, 2 * piece + 1, 130):
        tokens = _tokens(length + 3)
        with torch.no_grad():
            expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(_logits(decoder, tokens, then=3), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", _WINDOWED)
def test_a_cut_prompt_gives_what_the_whole_one_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, tokens = SpanDecoder(_model(name)), _tokens(200)
    whole = _logits(decoder, tokens)
    monkeypatch.setattr(spans, "_PIECE", 48)
    torch.testing.assert_close(_logits(decoder, tokens), whole, rtol=1e-5, atol=2e-5)
    monkeypatch.setattr(decoder, "_windows", [window and window - 1 for window in decoder._windows])
    assert not torch.allclose(_logits(decoder, tokens), whole, atol=1e-2)  # one position less is noticed


def _attention(monkeypatch: pytest.MonkeyPatch, decoder: SpanDecoder, tokens: Tensor) -> tuple[int, int]:
    """The largest mask and the sum of all scores, in numbers."""
    masks, scores = [0], 0
    real = F.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        nonlocal scores
        masks.append(0 if attn_mask is None else attn_mask.numel())
        scores += query.shape[1] * query.shape[2] * key.shape[2]
        return real(query, key, value, attn_mask=attn_mask, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", counted)
        _logits(decoder, tokens)
    return max(masks), scores


@pytest.mark.parametrize("name", ["mistral", "qwen2, second half", "phi3 by modules"])
def test_masks_and_work_of_windowed_blocks_do_not_grow_with_the_square_of_the_prompt(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "_PIECE", 32)
    decoder = SpanDecoder(_model(name))
    (short, less), (long, more) = (_attention(monkeypatch, decoder, _tokens(length)) for length in (256, 512))
    if name == "phi3 by modules":  # its layers look at everything that is stored
        assert (short, long) == (32 * 256, 32 * 512)
    else:  # two query heads of a group lie side by side
        assert short == long == 2 * 32 * (32 + _WINDOW - 1)
    if name == "mistral":
        assert more < 2.2 * less


def test_blocks_that_need_no_mask_take_the_whole_prompt_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "_PIECE", 32)
    decoder = SpanDecoder(build("llama", num_layers=4, seed=1))
    assert _attention(monkeypatch, decoder, _tokens(100)) == (0, 4 * 4 * 100 * 100)


def test_a_step_looks_at_a_window_and_not_at_all_that_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, tokens = SpanDecoder(_model("mistral")), _tokens(100)
    with torch.no_grad():
        cache = decoder.new_cache(capacity=101)
        decoder.run_blocks(decoder.embed(tokens), start=0, stop=4, cache=cache)
        lengths: list[int] = []
        real = F.scaled_dot_product_attention
        monkeypatch.setattr(
            F, "scaled_dot_product_attention", lambda q, k, *a, **r: lengths.append(k.shape[2]) or real(q, k, *a, **r)
        )
        decoder.run_blocks(decoder.embed(tokens[:, :1]), start=0, stop=4, cache=cache)
    assert lengths == [_WINDOW] * 4


def test_keys_are_repeated_where_a_gpu_would_else_compute_all_scores_at_once() -> None:
    mask = torch.zeros(1)
    for dtype in (torch.float32, torch.bfloat16):
        assert not needs_repeated_keys(torch.zeros(1, dtype=dtype), mask)
        assert needs_repeated_keys(torch.zeros(1, dtype=dtype, device="meta"), mask)
    assert needs_repeated_keys(torch.zeros(1, device="meta"), None)
    assert not needs_repeated_keys(torch.zeros(1, dtype=torch.bfloat16, device="meta"), None)


@pytest.mark.parametrize("name", ["mistral", "qwen3, in turns"])
def test_repeated_keys_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "_PIECE", 64)
    decoder, tokens, grouped = SpanDecoder(_model(name)), _tokens(200), list[bool]()
    expected = _logits(decoder, tokens)
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(functional_block, "needs_repeated_keys", lambda query, mask: True)
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *a, enable_gqa=False, **r: grouped.append(enable_gqa) or real(*a, **r),
    )
    torch.testing.assert_close(_logits(decoder, tokens), expected, rtol=1e-5, atol=2e-5)
    assert grouped
    assert not any(grouped)
