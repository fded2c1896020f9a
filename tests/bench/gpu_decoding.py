"""What `make bench-gpu` measures of decoding: models of random weights whose drafts are right as often as we say.

Shape legend: `B` sequences, `T` positions, `V` vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from app.benchmark.transformers_baseline import generate_batch
from app.decoding.engine import decode_batch
from app.decoding.settings import ENGINES, DecodingSettings
from app.decoding.strategies import Strategy
from app.model.quantized import QUANTIZATIONS, Quantization, check_kernel, round_weights
from app.spans.decoder import SpanDecoder
from app.spans.functional_block import join_projections

_LEFT_OUT = 4  # first and last rounds, in which graphs are recorded: the last ones draft less than the others
Line = dict[str, Any]


class Shape(NamedTuple):
    """A model's sizes, with the exit and draft length that are tried on it."""

    config: LlamaConfig
    exit_layer: int
    num_draft_tokens: int


def llama(layers: int, width: int, heads: int, hidden: int, vocabulary: int, **settings: Any) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=hidden,
        vocab_size=vocabulary,
        **({"num_key_value_heads": heads, "max_position_embeddings": 2048} | settings),
    )


SHAPES = {
    "135M": Shape(llama(30, 576, 9, 1536, 49152, num_key_value_heads=3, tie_word_embeddings=True), 6, 4),
    "1.5B": Shape(llama(24, 2048, 16, 5504, 32000), 6, 6),
    "7B": Shape(llama(32, 4096, 32, 11008, 32000), 8, 6),
}
TINY = {"tiny": Shape(llama(4, 32, 4, 64, 61, num_key_value_heads=2, max_position_embeddings=256), 1, 2)}


class PlantedDecoder(SpanDecoder):
    """Drafts what the full model says, but for a share of drafts chosen by chance, which are another token.

    Blocks from the exit on have been made to add nothing (`plant`), so the exit says what the full model does at the
    cost of a model that was trained. Chance is the device's own generator, which graphs replay.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.acceptance = torch.ones((), device=self.device)  # where a recorded graph reads what it is now

    def draft_logits(self, hidden_BTD: Tensor, *, exit_layer: int) -> Tensor:
        logits_BTV = super().draft_logits(hidden_BTD, exit_layer=exit_layer)
        is_right_BT1 = torch.rand(logits_BTV.shape[:-1], device=logits_BTV.device)[..., None] < self.acceptance
        return logits_BTV.where(is_right_BT1, logits_BTV.roll(1, -1))


def build(shape: Shape, *, device: torch.device, dtype: torch.dtype, planted: bool) -> PreTrainedModel:
    """A random model on the device, with weights large enough that what it says varies."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(3.0)
        for layer in model.model.layers[shape.exit_layer :] if planted else ():
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    join_projections(model)
    return model


@dataclass(frozen=True, kw_only=True)
class Request:
    """Prompts of random tokens, and how many new ones each gets."""

    num_prompts: int
    prompt_length: int
    new_tokens: int

    def prompts(self, vocab_size: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(vocab_size, (self.num_prompts, self.prompt_length), generator=generator).tolist()


def correctness(shape: Shape, request: Request, *, device: torch.device) -> Iterator[Line]:
    """Compare every way of ours with dynamic autoregressive decoding: identity in fp32, mismatching prompts in bf16."""
    kinds: list[tuple[torch.dtype, Quantization]] = [(torch.float32, "none")]
    for dtype, quantization in [*kinds, *((torch.bfloat16, each) for each in QUANTIZATIONS)]:
        model = build(shape, device=device, dtype=dtype, planted=False)
        if quantization != "none":
            check_kernel(quantization, device)
            round_weights([model], quantization)
        decoder = SpanDecoder(model, quantization=quantization)
        prompts = request.prompts(decoder.vocab_size)
        expected = None
        for engine in ENGINES:
            for strategy in ("autoregressive", "self_speculative"):
                found = [result.tokens for result in _decode(decoder, prompts, shape, request, strategy, engine=engine)]
                expected = expected or found
                same = sum(one == other for one, other in zip(found, expected, strict=True))
                yield {
                    "dtype": str(dtype).removeprefix("torch.") if quantization == "none" else quantization,
                    "way": f"{strategy}, {engine}",
                    "identical": same,
                    "prompts": len(prompts),
                }


def speeds(
    name: str, shape: Shape, request: Request, *, device: torch.device, with_compiled: bool = False
) -> Iterator[Line]:
    """Time one prompt in each way, in bfloat16, with drafts planted; tokens a second without first and last rounds."""
    model = build(shape, device=device, dtype=torch.bfloat16, planted=True)
    decoder = PlantedDecoder(model)
    prompts = replace(request, num_prompts=1).prompts(decoder.vocab_size)
    bound = _bytes_read(model) / read_bandwidth(device)
    engines = [*ENGINES, *(["static, compiled"] if with_compiled else [])]
    own = [("autoregressive", engine, 1.0) for engine in engines]
    own += [("self_speculative", engine, rate) for rate in (0.6, 0.8, 1.0) for engine in engines]
    for strategy, engine, rate in own:
        decoder.acceptance.fill_(rate)
        arrivals: list[tuple[float, int]] = []
        (result,) = _decode(decoder, prompts, shape, request, strategy, engine=engine, arrivals=arrivals)  # type: ignore[arg-type]
        (start, _), *timed = arrivals[_LEFT_OUT:-_LEFT_OUT]
        speed = sum(tokens for _, tokens in timed) / (timed[-1][0] - start)
        line: Line = {"model": name, "way": f"{strategy}, {engine}", "tokens_per_second": speed}
        if strategy == "self_speculative":
            line |= {"chance_of_right_draft": rate, "acceptance": result.acceptance_rate}
        else:
            line["share_of_bandwidth_bound"] = speed * bound
        yield line
    plain = DecodingSettings(max_new_tokens=request.new_tokens)
    early = replace(plain, exit_layer=shape.exit_layer, num_draft_tokens=shape.num_draft_tokens)
    for way, settings in (("transformers", plain), ("transformers, assistant_early_exit", early)):
        with torch.no_grad():
            generate_batch(model, prompts, replace(settings, max_new_tokens=8))  # warms up
            (result,) = generate_batch(model, prompts, settings)
        yield {"model": name, "way": way, "tokens_per_second": result.tokens_per_second}


def _decode(
    decoder: SpanDecoder,
    prompts: Sequence[Sequence[int]],
    shape: Shape,
    request: Request,
    strategy: Strategy,
    *,
    engine: Any,
    arrivals: list[tuple[float, int]] | None = None,
) -> Any:
    drafting: dict[str, Any] = {"exit_layer": shape.exit_layer, "num_draft_tokens": shape.num_draft_tokens}
    drafting = drafting if strategy == "self_speculative" else {}
    engine, _, compiled = engine.partition(", ")
    settings = DecodingSettings(
        max_new_tokens=request.new_tokens, engine=engine, compile_rounds=compiled == "compiled", **drafting
    )
    on_step: Callable[..., None] | None = None
    if arrivals is not None:
        on_step = lambda _, step: arrivals.append((perf_counter(), len(step.tokens)))  # noqa: E731
    with torch.inference_mode():
        return decode_batch(decoder, prompts, strategy=strategy, settings=settings, on_step=on_step)


def _bytes_read(model: PreTrainedModel) -> int:
    """What a token must read at least: all weights but those of an embedding that is not the head, too."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    skipped = 0 if embedding is head else embedding.nbytes
    return sum(int(parameter.nbytes) for parameter in model.parameters()) - int(skipped)


def read_bandwidth(device: torch.device, *, size: int = 2**30, repeats: int = 5) -> float:
    """Bytes a second at which this device reads memory that no cache holds, at its best."""
    held = torch.zeros(size if device.type == "cuda" else size // 16, dtype=torch.int8, device=device).view(torch.int64)
    seconds = []
    for _ in range(repeats):
        started = perf_counter()
        held.sum().item()
        seconds.append(perf_counter() - started)
    return held.nbytes / min(seconds)
