"""Rounds that are fixed sequences of kernels: one wait each, nothing moves, the same tokens as looking at every draft.

test_greedy_equality.py, test_batches.py and test_sampled_output.py run their properties on these rounds, too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from app.decoding.engine import Decoding
from app.decoding.fixed_sequence import FixedSequence
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import ENGINES, DecodingSettings, Ends, Engine
from app.decoding.static_program import StaticProgram
from app.decoding.strategies import STRATEGIES
from app.errors import ConfigError
from tests.support.decoding import decode
from tests.unit.decoding.model_zoo import CONTEXT, VOCAB, decoder_named, decoder_with_exit_blocks, prompt_of

_NAME = "llama whose exits agree"
_WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


def _decoding(engine: Engine, *, prompts: int = 1, **changed: Any) -> Decoding:
    decoder = decoder_with_exit_blocks(_NAME)
    decoder.limit = CONTEXT
    given = {"max_new_tokens": 40, "exit_layer": 1, "num_draft_tokens": 3, "eos_token_ids": (VOCAB - 1,)} | changed
    settings = DecodingSettings(engine=engine, **given)
    generators = None if settings.sampling.greedy else [torch.Generator().manual_seed(i) for i in range(prompts)]
    texts = [prompt_of(9 + i) for i in range(prompts)]
    return Decoding(decoder, texts, strategy="self_speculative", settings=settings, generators=generators)


@contextmanager
def _counted(counts: list[str]) -> Iterator[None]:
    """Note each call that would make the host wait for a device."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _WAITS:
            real = getattr(Tensor, name)
            patch.setattr(Tensor, name, _noting(real, name, counts))
        yield


def _noting(real: Callable[..., Any], name: str, counts: list[str]) -> Callable[..., Any]:
    def called(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts.append(name)
        return real(self, *args, **kwargs)

    return called


@pytest.mark.parametrize("policy", ["fixed", "adaptive"])
@pytest.mark.parametrize("sampling", [SamplingSettings(), SamplingSettings(temperature=0.8, top_p=0.9)])
def test_a_round_waits_once_however_much_it_drafts(sampling: SamplingSettings, policy: str) -> None:
    waits = {}
    engines: tuple[Engine, ...] = ("static", "dynamic")
    for engine in engines:
        decoding = _decoding(engine, sampling=sampling, draft_policy=policy, eos_token_ids=())
        decoder_with_exit_blocks(_NAME).use_draft_vocabulary(range(0, VOCAB, 2))
        counts: list[str] = []
        rounds = []
        with _counted(counts):
            for _ in decoding:
                rounds.append(len(counts))
                counts.clear()
        decoder_with_exit_blocks(_NAME).use_draft_vocabulary(None)
        waits[engine] = rounds[1:]  # the first is the prompt's pass
    assert set(waits["static"]) == {1}
    assert max(waits["dynamic"]) > 1, "the count sees nothing"


def test_nothing_that_a_round_reads_or_writes_moves_until_the_text_outgrows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.decoding.engine._RESERVE", 8)
    places: list[tuple[int, ...]] = []
    real = StaticProgram.round

    def watched(self: StaticProgram, num_drafts: int) -> Tensor:
        cache: Any = self.cache
        stores = [each for pair in cache._stores if pair is not None for each in pair]
        buffers = [self._tokens_BS, self.given_BG, self.outcome_BO, cache.lengths_B, *stores]
        places.append((cache.capacity, *(each.data_ptr() for each in buffers)))
        return real(self, num_drafts)

    monkeypatch.setattr(StaticProgram, "round", watched)
    static = _decoding("static", prompts=3, max_new_tokens=80).finish()
    assert len(places) > 20
    assert len(set(places)) == len({capacity for capacity, *_ in places}) == 3  # 32, 64 and 128 positions
    dynamic = _decoding("dynamic", prompts=3, max_new_tokens=80).finish()
    assert [result.tokens for result in static] == [result.tokens for result in dynamic]


def test_a_row_that_ended_near_the_end_of_its_buffer_writes_to_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.decoding.engine._RESERVE", 8)
    decoder, prompts = decoder_with_exit_blocks(_NAME), [prompt_of(length) for length in (18, 8, 9, 10)]
    decoder.limit = CONTEXT
    ends = [
        Ends(40, lambda prompt, tokens, _: len(tokens) if len(prompt) + len(tokens) >= 30 else None),
        *[Ends(20)] * 3,
    ]
    results = {}
    for engine in ENGINES:
        settings = DecodingSettings(max_new_tokens=40, exit_layer=1, num_draft_tokens=3, engine=engine)
        decoding = Decoding(decoder, prompts, strategy="self_speculative", settings=settings, ends=ends)
        results[engine] = [result.tokens for result in decoding.finish()]
    assert results["static"] == results["dynamic"]
    assert len(results["static"][0]) < 16  # it ended in buffers of 32 positions, long before the others


@pytest.mark.parametrize("sampling", [SamplingSettings(), SamplingSettings(temperature=0.8)])
def test_the_next_request_of_a_kind_runs_what_the_last_one_left_and_one_meanwhile_does_not(
    sampling: SamplingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[StaticProgram] = []
    real = StaticProgram.__init__

    def watched(self: StaticProgram, *args: Any, **kwargs: Any) -> None:
        built.append(self)
        real(self, *args, **kwargs)

    decoder_with_exit_blocks(_NAME).use_draft_vocabulary(None)  # forgets what other tests left
    expected = [result.tokens for result in _decoding("static", sampling=sampling, prompts=3).finish()]
    decoder_with_exit_blocks(_NAME).use_draft_vocabulary(None)
    monkeypatch.setattr(StaticProgram, "__init__", watched)
    started = _decoding("static", sampling=sampling, prompts=3)
    rounds = iter(started)
    next(rounds)
    meanwhile = _decoding("static", sampling=sampling, prompts=3).finish()
    for _ in rounds:
        pass
    after = _decoding("static", sampling=sampling, prompts=4, max_new_tokens=38).finish()
    assert [result.tokens for result in started.results()] == [result.tokens for result in meanwhile] == expected
    assert [result.tokens for result in after[:3]] == [tokens[:38] for tokens in expected]
    assert len(built) == 2, "the last request had the buffers of the first"


def test_a_cache_that_memory_cannot_hold_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    decoder_with_exit_blocks(_NAME).use_draft_vocabulary(None)
    monkeypatch.setattr(Tensor, "new_zeros", full)
    with pytest.raises(ConfigError, match="engine: got 'static with room for 4 x 64 positions'"):
        _decoding("static", prompts=3).finish()


def test_a_draft_is_as_long_as_the_least_power_of_two_that_holds_what_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: list[int] = []
    real = StaticProgram.round
    monkeypatch.setattr(StaticProgram, "round", lambda self, num: lengths.append(num) or real(self, num))
    found = _decoding("static", num_draft_tokens=6, max_new_tokens=9).finish()[0]
    assert lengths[0] == 6
    assert {*lengths} <= {0, 1, 2, 4, 6}
    assert all(step.drafted <= length for step, length in zip(found.steps, lengths, strict=True))
    assert len(found.tokens) == 9


def test_a_cuda_device_replays_what_the_second_call_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Graph:
        def replay(self) -> None:
            log.append("replayed")

    @contextmanager
    def recording(graph: Graph) -> Iterator[None]:
        log.append("recording")
        yield

    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", recording)
    sequence = FixedSequence(lambda: log.append("run"), torch.device("cuda"))
    for _ in range(3):
        sequence()
    assert log == ["run", "recording", "run", "replayed", "replayed"]
    log.clear()
    monkeypatch.setattr("torch.compile", lambda function, **_: lambda: (log.append("compiled"), function()))
    sequence = FixedSequence(lambda: log.append("run"), torch.device("cuda"), compiled=True)
    for _ in range(4):
        sequence()
    assert log == [*["compiled", "run"] * 2, "recording", "compiled", "run", "replayed", "replayed"]


def test_compiled_rounds_are_traced_as_one_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"num_draft_tokens": 1, "max_new_tokens": 6}
    decoder_with_exit_blocks(_NAME).use_draft_vocabulary(None)  # forgets what other tests left
    expected = _decoding("static", **given).finish()[0].tokens
    compiled: list[Callable[[], None]] = []

    def traced(function: Callable[[], None], **settings: bool) -> Any:
        compiled.append(function)
        return real(function, fullgraph=True, backend="eager", **settings)

    real = torch.compile
    monkeypatch.setattr("torch.compile", traced)
    with torch._dynamo.config.patch(recompile_limit=2):  # of each sequence: a further one is an error
        assert _decoding("static", compile_rounds=True, **given).finish()[0].tokens == expected
    assert len(compiled) == 2  # a draft of one token, and the last round, which drafts none


def test_compiling_needs_static_rounds_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match="compile_rounds: got True, allowed false with engine dynamic; give engine static"
    ):
        _decoding("dynamic", compile_rounds=True)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"compile_rounds: got True, allowed false without a C\+\+ compiler \(g\+\+ \| "
    ):
        _decoding("static", compile_rounds=True)


@pytest.mark.parametrize(
    ("strategy", "settings", "named"),
    [
        ("layer_skip", {"skipped_layers": (1,)}, "strategy layer_skip"),
        ("self_speculative", {"n_gram_match": 2}, "n_gram_match; n_gram_match 0 drafts without"),
        ("self_speculative", {"sampling": SamplingSettings(processor=lambda _, scores: scores)}, "a processor"),
    ],
)
def test_what_needs_the_host_between_drafts_is_refused_by_name(
    strategy: Any, settings: dict[str, Any], named: str
) -> None:
    assert strategy in STRATEGIES
    given = DecodingSettings(max_new_tokens=4, exit_layer=1, num_draft_tokens=2, engine="static", **settings)
    with pytest.raises(ConfigError, match=f"engine: got 'static', allowed dynamic with {named}"):
        decode(decoder_named(_NAME), [1], strategy=strategy, settings=given)
