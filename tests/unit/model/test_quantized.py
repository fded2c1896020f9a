"""Products in 8 and 4 bits are those of the rounded weights, and what is decoded is theirs, with drafts too."""

import pytest
import torch

from app.decoding.engine import decode_batch
from app.decoding.settings import DecodingSettings
from app.errors import ConfigError
from app.model.cpu.products import Product
from app.model.quantized import _PACK_4_BITS, GROUP, _for_cpu, check_kernel, in_4_bits, in_8_bits, round_weights
from app.spans.decoder import SpanDecoder
from tests.support.tiny_models import tiny_llama


@pytest.mark.parametrize(
    ("pack", "quantization", "levels", "size"), [(in_8_bits, "int8", 255, 64), (in_4_bits, "int4", 16, GROUP)]
)
@pytest.mark.parametrize("outputs", [61, 128])
def test_a_product_is_that_of_weights_rounded_to_levels_of_their_group(pack, quantization, levels, size, outputs):
    weight = torch.randn(outputs, 64, generator=torch.Generator().manual_seed(0))
    rounded, multiply = pack(weight)
    groups, own = (each.unflatten(1, (-1, size)) for each in (rounded, weight))
    span = 2 * own.abs().amax(-1) if levels == 255 else own.amax(-1) - own.amin(-1)
    error = (groups - own).abs() / (span / (levels - 1))[..., None]
    assert 0.4 < error.max() < 0.51  # in steps between two levels
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(multiply(inputs), inputs @ rounded.T, atol=1e-4)
    product = Product(rounded, torch.ones(outputs), quantization)
    for positions in (1, 3, 40):  # 40 take the rounded weight as it is
        few = inputs[:1].expand(positions, -1)[None]
        assert torch.allclose(product(few), few @ rounded.T + 1, atol=1e-4)


@pytest.mark.parametrize("width", [8, 33, 48])
def test_rows_of_any_width_are_multiplied_in_8_bits(width):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(61, width, generator=generator).bfloat16() for _ in range(2))
    rounded, multiply = in_8_bits(weight)
    torch.testing.assert_close(
        multiply(inputs[:3]).float(), inputs[:3].float() @ rounded.float().T, atol=0.1, rtol=0.02
    )


def test_a_weight_of_zeros_stays_so_and_rows_that_no_group_divides_are_refused():
    for pack in (in_8_bits, in_4_bits):
        rounded, multiply = pack(torch.zeros(64, 64))
        assert not rounded.any()
        assert not multiply(torch.ones(1, 64)).any()
    with pytest.raises(
        ConfigError, match=r"quantization: got 'int4 of rows of 33', allowed multiples of 32; take int8"
    ):
        in_4_bits(torch.zeros(64, 33))


def test_rounding_a_model_twice_changes_it_once_and_takes_a_tied_embedding_along():
    model = tiny_llama(hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    round_weights([model], "int8")
    once = {name: each.clone() for name, each in model.state_dict().items()}
    round_weights([model], "int8")
    changed = [name for name, each in once.items() if not torch.equal(each, before[name])]
    assert "model.embed_tokens.weight" in changed
    assert all(name.endswith(("_proj.weight", "lm_head.weight", "embed_tokens.weight")) for name in changed)
    assert len(changed) == 4 * 7 + 2
    assert all(torch.allclose(each, once[name], atol=1e-6) for name, each in model.state_dict().items())


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_drafts_change_nothing_that_the_quantised_model_says(quantization):
    model = tiny_llama(vocab_size=330, hidden_size=64, intermediate_size=96, max_length=96)
    whole = model(torch.tensor([[7, 8, 9]])).logits.detach()
    round_weights([model], quantization)
    decoder = SpanDecoder(model, quantization=quantization)
    decoder.use_draft_vocabulary(range(0, 330, 2))
    prompts = [[1, 2, 3], [7, 8, 9, 10, 11]]
    found = {}
    for strategy, drafting in (("autoregressive", {}), ("self_speculative", {"exit_layer": 2, "num_draft_tokens": 3})):
        settings = DecodingSettings(max_new_tokens=24, **drafting)
        found[strategy] = [each.tokens for each in decode_batch(decoder, prompts, strategy=strategy, settings=settings)]
    assert found["self_speculative"] == found["autoregressive"]
    with torch.no_grad():
        ids = torch.tensor([[7, 8, 9]])
        cache = decoder.new_cache(capacity=3)
        own = decoder.unembed(decoder.run_blocks(decoder.embed(ids), start=0, stop=decoder.num_layers, cache=cache))
        assert torch.allclose(own, model(ids).logits, atol=1e-2)  # transformers runs the rounded weights
        distance = (own - whole).norm() / whole.norm()
    assert 1e-4 < distance < (0.1 if quantization == "int8" else 1.0)


@pytest.fixture
def kernels_of_cuda(monkeypatch):
    """torch's kernels of a CUDA device for weights of 4 bits, by what its source says of them, on a processor."""

    def pack(pairs_OI, tiles):
        assert (pairs_OI.dtype, pairs_OI.is_contiguous(), pairs_OI.shape[1] % (tiles * 8)) == (torch.uint8, True, 0)
        assert len(pairs_OI) % 8 == 0
        shape = torch.ops.aten._convert_weight_to_int4pack(pairs_OI.to("meta"), tiles).shape
        return pairs_OI.contiguous().view(torch.int32).reshape(shape)  # the order within is the kernel's own affair

    def multiply(inputs_NI, packed, group, scale_and_zero_GO2):
        assert (packed.dtype, 8 * len(packed)) == (torch.int32, scale_and_zero_GO2.shape[1])
        assert inputs_NI.dtype == scale_and_zero_GO2.dtype == torch.bfloat16
        pairs_OI = packed.flatten().view(torch.uint8).view(scale_and_zero_GO2.shape[1], -1)
        integers_OI = torch.stack((pairs_OI >> 4, pairs_OI & 15), -1).flatten(1).float() - 8
        scale_OI, zero_OI = scale_and_zero_GO2.float().permute(2, 1, 0).repeat_interleave(group, -1)
        return (inputs_NI.float() @ (integers_OI * scale_OI + zero_OI).T).bfloat16()

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_convert_weight_to_int4pack", pack)
    library.impl("_weight_int4pack_mm", multiply)
    monkeypatch.setitem(_PACK_4_BITS, "cpu", _PACK_4_BITS["cuda"])
    yield library
    library._destroy()


@pytest.mark.parametrize("width", [32, 64, 96, 256])
def test_on_a_cuda_device_the_same_weights_of_4_bits_are_packed_as_its_kernel_takes_them(kernels_of_cuda, width):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(61, width, generator=generator).bfloat16() for _ in range(2))
    rounded, multiply = in_4_bits(weight)
    torch.testing.assert_close(
        multiply(inputs[:3]).float(), inputs[:3].float() @ rounded.float().T, atol=0.1, rtol=0.02
    )
    check_kernel("int4", torch.device("cpu"))


def test_a_kernel_that_is_missing_or_wrong_is_told_before_a_model_is_rounded(monkeypatch):
    check_kernel("int8", torch.device("cpu"))
    with monkeypatch.context() as patch:  # a processor has no kernel of that name
        patch.setitem(_PACK_4_BITS, "cpu", _PACK_4_BITS["cuda"])
        with pytest.raises(
            ConfigError, match="got 'int4 on cpu', allowed none, or device cpu; torch's kernel does not"
        ):
            check_kernel("int4", torch.device("cpu"))
    swapped = list(range(64))[::-1]
    monkeypatch.setitem(_PACK_4_BITS, "cpu", lambda integers: _for_cpu(integers[:, swapped]))
    with pytest.raises(ConfigError, match="allowed none, or device cpu; torch's kernel is off by"):
        check_kernel("int4", torch.device("cpu"))
