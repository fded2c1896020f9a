"""transformers' own `generate`, measured as our strategies are: plain, and with its own `assistant_early_exit`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from app.benchmark.alternation import Prompts
from app.decoding.result import DecodingResult, Step
from app.decoding.settings import DecodingSettings


@dataclass(frozen=True, kw_only=True)
class GenerateResult(DecodingResult):
    """New tokens of one prompt. transformers does not tell what it drafted, so acceptance is not known."""

    # New tokens that came at the end of `seconds_prefill`: several with `assistant_early_exit`, which drafts before the
    # full model has seen the prompt, and verifies in the prompt's own pass.
    num_prefilled: int

    @property
    def num_decoded(self) -> int:
        return max(self.num_tokens - self.num_prefilled, 0)


class _Arrivals(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Notes when tokens come. generate waits for the tokens of each step anyway: this costs a microsecond a step."""

    def __init__(self) -> None:
        self.all: list[tuple[float, Tensor]] = []

    def put(self, value: Tensor) -> None:  # [B] or [1, T]: the prompts, then what each step or round settled
        self.all.append((perf_counter(), value))

    def end(self) -> None:
        pass  # nothing is held back


def generate_batch(model: PreTrainedModel, prompts: Prompts, settings: DecodingSettings) -> list[GenerateResult]:
    """Continue prompts greedily by `model.generate`, padded on the left where they are of different lengths.

    Args:
        model: In eval mode, with SDPA attention; its generation and model configuration are put back afterwards.
        prompts: Token ids; a single prompt where `settings.exit_layer` is given.
        settings: Budget and end of sequence; with `exit_layer` and `num_draft_tokens` transformers speculates by
            itself. It then stops a draft at a token it gives a probability below 0.4, which is its default.
    """
    context = int(model.config.max_position_embeddings)
    budgets = [min(settings.max_new_tokens, context - len(prompt)) for prompt in prompts]
    eos = list(settings.eos_token_ids)
    config = GenerationConfig(
        max_new_tokens=max(budgets),
        do_sample=False,
        use_cache=True,
        eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,
        num_assistant_tokens=settings.num_draft_tokens,
        num_assistant_tokens_schedule="constant",
    )
    assistant = {} if settings.exit_layer is None else {"assistant_early_exit": settings.exit_layer}
    arrivals = _Arrivals()
    width = max(map(len, prompts))
    started_at = perf_counter()
    tokens_BT = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts], device=model.device)
    mask_BT = (torch.arange(width, device=model.device) >= width - lengths_B1).long()
    with _generation_config(model, config):
        model.generate(tokens_BT, attention_mask=mask_BT, streamer=arrivals, **assistant)
    rounds = [(at, tokens.reshape(len(prompts), -1).tolist()) for at, tokens in arrivals.all[1:]]
    return [
        _result(
            [(at, tokens[row]) for at, tokens in rounds],
            budget=budget,
            eos_token_ids=eos,
            limited_by_context=budget < settings.max_new_tokens,
            started_at=started_at,
        )
        for row, budget in enumerate(budgets)
    ]


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Let `config` alone decide inside, because generate fills what it is not given from the model's own config.

    transformers reads `num_assistant_tokens` from the model's config alone. For a draft it lowers `num_hidden_layers`,
    which an interrupted draft would leave behind: it is put back here.
    """
    own, num_layers = model.generation_config, model.config.num_hidden_layers
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config, model.config.num_hidden_layers = own, num_layers


def _result(
    rounds: Sequence[tuple[float, list[int]]],
    *,
    budget: int,
    eos_token_ids: Sequence[int],
    limited_by_context: bool,
    started_at: float,
) -> GenerateResult:
    """Return the result of one sequence from its rounds up to its end; tokens after the end are padding."""
    settled: list[list[int]] = []
    room, ended = budget, False
    while room and not ended:
        new = rounds[len(settled)][1][:room]
        if ends := [i + 1 for i, token in enumerate(new) if token in eos_token_ids]:
            new, ended = new[: ends[0]], True
        settled.append(new)
        room -= len(new)
    return GenerateResult(
        tokens=[token for new in settled for token in new],
        stop_reason="eos" if ended else "context_length" if limited_by_context else "max_new_tokens",
        seconds_prefill=rounds[0][0] - started_at,
        seconds_decode=rounds[len(settled) - 1][0] - rounds[0][0],
        steps=tuple(Step(new) for new in settled[1:]),
        num_prefilled=len(settled[0]),
    )
