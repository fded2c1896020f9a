import pytest
import torch

from app.benchmark.decoding_costs import DecodingCosts
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import STRATEGIES
from app.model.exit_block import ExitBlock
from app.spans.decoder import SpanDecoder
from app.tuning.layer_agreement import measure_layer_agreement
from tests.support.tiny_models import tiny_llama

SETTINGS = DecodingSettings(max_new_tokens=4, exit_layer=1, num_draft_tokens=2, skipped_layers=(1,))


class OnGpu(SpanDecoder):
    """Says that it is, as far as costs ask."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


@pytest.mark.parametrize("strategy", ["self_speculative", "layer_skip", "draft_model"])
def test_a_further_position_is_taken_for_dear_in_float32_on_a_cpu_alone(strategy: str) -> None:
    def extra_token(decoder: SpanDecoder) -> float:
        costs = STRATEGIES[strategy].costs  # type: ignore[index]
        assert costs is not None
        settings = DecodingSettings(**{**SETTINGS.__dict__, "draft_decoder": decoder})
        return costs(decoder, settings).extra_token

    model = tiny_llama()
    assert extra_token(SpanDecoder(model)) == 0.08
    assert extra_token(OnGpu(model.to("meta"))) == 0.03
    assert extra_token(SpanDecoder(tiny_llama().bfloat16())) == 0.03


def test_what_a_draft_costs_counts_the_affine_map_of_an_exits_own() -> None:
    model = tiny_llama()
    block = ExitBlock(model, exit_layer=1, source_layers=[2], affine=True).eval()
    decoder, width = SpanDecoder(model, exit_blocks={1: block}), model.config.hidden_size
    own = 1 + width * (width + 1) / decoder.block_size  # its weight and bias
    by_parameters = STRATEGIES["self_speculative"].costs
    assert by_parameters is not None
    head = decoder.draft_head_size / decoder.block_size
    assert by_parameters(decoder, SETTINGS).draft_step == pytest.approx(1 + own + head)
    measured = DecodingCosts(
        block_seconds=1.0, head=2.0, draft_head=0.5, first_extra=0.0, extra_token=0.1, overhead=0.0
    )
    assert measured.of_exit(decoder, 1).draft_step == pytest.approx(1 + own + 0.5)
    agreement = measure_layer_agreement(decoder, [[1, 2]], DecodingSettings(max_new_tokens=3))
    assert agreement.cost_model(measured, 1).draft_step == pytest.approx(1 + own + 0.5)
    assert agreement.cost_model(measured, 2).draft_step == pytest.approx(2 + 0.5)
