"""Decoding of tiny random models in fp32: what greedy equality and batches do not show."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.decoding.result import DecodingResult
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings
from app.errors import NotFiniteError
from app.model.cpu import products
from app.spans.decoder import SpanDecoder
from app.spans.functional_block import Projections, join_projections
from tests.support.decoding import decode
from tests.support.slow_twins import greedy_by_recomputation
from tests.unit.decoding.model_zoo import CONTEXT, NAMES, build, continuation, decoder_named, model_named, prompt_of

_NAME = "llama whose exits agree"
_NUM_TOKENS = 24


def _speculate(decoder: SpanDecoder, prompt: list[int], **changed: object) -> DecodingResult:
    chosen = {"max_new_tokens": _NUM_TOKENS, "exit_layer": 1, "num_draft_tokens": 4} | changed
    return decode(decoder, prompt, strategy="self_speculative", settings=DecodingSettings(**chosen))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_early_exit_decoding_equals_recomputation_at_that_exit(name: str) -> None:
    model, decoder, prompt = model_named(name), decoder_named(name), prompt_of(9)
    decoder.limit = CONTEXT
    outputs = []
    for exit_layer in range(1, decoder.num_layers + 1):
        settings = DecodingSettings(max_new_tokens=12, exit_layer=exit_layer)
        outputs.append(decode(decoder, prompt, strategy="early_exit", settings=settings).tokens)
        twin = greedy_by_recomputation(model, prompt, max_new_tokens=12, exit_layer=exit_layer, least_gap=1e-3)
        assert outputs[-1][: len(twin)] == twin
    assert outputs[0] != outputs[-1]


def test_each_generated_token_as_eos_ends_decoding_where_it_first_comes() -> None:
    decoder, whole = decoder_named(_NAME), continuation(_NAME, 5, _NUM_TOKENS)
    decoder.limit = CONTEXT
    for eos in set(whole):
        result = _speculate(decoder, prompt_of(5), eos_token_ids=(eos,))
        assert (result.tokens, result.stop_reason) == (whole[: whole.index(eos) + 1], "eos")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poisoned", ["block", "head"])  # the full model alone, and drafts, too
def test_logits_that_are_not_finite_end_decoding_by_name(temperature: float, poisoned: str) -> None:
    model = copy.deepcopy(model_named(_NAME))
    part = model.lm_head if poisoned == "head" else model.model.layers[-1].mlp.down_proj
    part.weight.data.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="the model's logits are not finite"):
        decode(
            SpanDecoder(model),
            prompt_of(5),
            strategy="self_speculative",
            settings=DecodingSettings(
                max_new_tokens=4, exit_layer=1, num_draft_tokens=2, sampling=SamplingSettings(temperature=temperature)
            ),
            generator=torch.Generator(),
        )


def test_a_cache_that_must_grow_again_and_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.decoding.engine._RESERVE", 1)
    monkeypatch.setattr("app.spans.kv_cache._GROWTH", 1)
    decoder = decoder_named(_NAME)
    decoder.limit = CONTEXT
    assert _speculate(decoder, prompt_of(1)).tokens == continuation(_NAME, 1, _NUM_TOKENS)


@pytest.mark.parametrize("name", [name for name in NAMES if "by modules" not in name and "phi3" not in name])
def test_every_product_either_way_round_gives_the_same_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    swaps, swapped_product = Counter[int](), products.swapped_product
    monkeypatch.setattr(products, "swapped_product", lambda *args: swaps.update([1]) or swapped_product(*args))
    for least in (2**60, 1):
        assert not swaps
        monkeypatch.setattr(products, "_LEAST_ELEMENTS", least)
        assert _speculate(SpanDecoder(model_named(name)), prompt_of(17)).tokens == continuation(name, 17, _NUM_TOKENS)
    assert swaps


@pytest.mark.parametrize(
    ("name", "length"),
    [
        *(("mistral with a window", length) for length in (6, 7, 8, 39, 40, 41, 47, 130)),
        *((f"{kind} with a window", length) for kind in ("qwen2", "phi3") for length in (7, 41)),
    ],
)
def test_prompts_around_and_far_beyond_a_window_continue_as_by_transformers(
    name: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.spans.decoder._PIECE", 40)
    model, prompt = model_named(name), prompt_of(length)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=_NUM_TOKENS)
    decoder = decoder_named(name)
    decoder.limit = CONTEXT
    assert _speculate(decoder, prompt).tokens == output[0, length:].tolist()


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_projections_may_share_memory_in_any_order_and_without_their_biases(order: tuple[int, ...]) -> None:
    model = copy.deepcopy(model_named("qwen2 with biases"))
    with torch.no_grad():
        for layer in model.model.layers:
            linears = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
            store = torch.cat([linears[index].weight for index in order])
            for index, part in zip(order, store.split([len(linears[i].weight) for i in order]), strict=True):
                linears[index].weight.data = part
    assert _speculate(SpanDecoder(model), prompt_of(17)).tokens == continuation("qwen2 with biases", 17, _NUM_TOKENS)


def test_joined_projections_are_one_product_with_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_FEWEST_INPUTS", 1)
    model = copy.deepcopy(model_named("qwen2 with biases"))
    attention = model.model.layers[0].self_attn
    linears = attention.q_proj, attention.k_proj, attention.v_proj
    inputs = torch.randn(1, 2, linears[0].in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = torch.cat([linear(inputs) for linear in linears], dim=-1)
        join_projections(model)
        projections = Projections(*linears, quantization="none")
        (product,) = projections._products
        torch.testing.assert_close(projections(inputs), apart)
    assert product.weight.t().is_contiguous()  # small weights in float32 are laid out input by input


def test_a_model_with_joined_projections_is_saved_and_loaded_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_FEWEST_INPUTS", 1)
    model = copy.deepcopy(model_named("qwen2 with biases"))
    join_projections(model)
    assert not model.model.layers[0].self_attn.q_proj.weight.is_contiguous()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name, weight in model_named("qwen2 with biases").state_dict().items():
        assert torch.equal(saved[name], weight), name


def test_a_decoder_sees_weights_that_change_under_it() -> None:
    model = copy.deepcopy(model_named(_NAME))
    decoder, prompt = SpanDecoder(model), prompt_of(9)
    before = _speculate(decoder, prompt).tokens
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.9)
    after = _speculate(decoder, prompt).tokens
    assert before != after == greedy_by_recomputation(model, prompt, max_new_tokens=_NUM_TOKENS)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad])
def test_the_callers_gradient_mode_does_not_matter(context: Callable[[], torch.no_grad]) -> None:
    decoder = SpanDecoder(copy.deepcopy(model_named(_NAME)))
    with context():
        assert _speculate(decoder, prompt_of(17)).tokens == continuation(_NAME, 17, _NUM_TOKENS)
    assert _speculate(decoder, prompt_of(17)).tokens == continuation(_NAME, 17, _NUM_TOKENS)


def test_sampling_is_a_function_of_the_generator_and_leaves_the_global_one_alone() -> None:
    decoder, before = decoder_named(_NAME), torch.get_rng_state()
    decoder.limit = CONTEXT
    sampling = SamplingSettings(temperature=1.0, top_k=20, top_p=0.95, min_p=0.01)
    settings = DecodingSettings(max_new_tokens=_NUM_TOKENS, exit_layer=1, num_draft_tokens=3, sampling=sampling)
    first, again, other = (
        decode(
            decoder,
            prompt_of(5),
            strategy="self_speculative",
            settings=settings,
            generator=torch.Generator().manual_seed(seed),
        ).tokens
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_decoding_leaves_no_gradient_and_no_inference_tensor_behind() -> None:
    model = build("llama", num_layers=3)
    _speculate(SpanDecoder(model), prompt_of(5))
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())
    model(torch.tensor([prompt_of(5)])).logits.sum().backward()
