import pytest
import torch

from app.decoding.settings import DecodingSettings
from app.decoding.strategies import STRATEGIES
from app.spans.decoder import SpanDecoder
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
