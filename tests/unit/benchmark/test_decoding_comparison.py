import itertools
from dataclasses import replace

import pytest

from app.benchmark import alternation
from app.benchmark.decoding_comparison import (
    DecodingComparison,
    compare_decoding,
    comparison_table,
    pool_comparisons,
)
from app.errors import ConfigError
from tests.support.fake_decoder import FakeDecoder, counting_decoder

_PROMPTS = [[1, 2], [7], [11, 12, 13]]


def _compare(decoder: FakeDecoder, **overrides: object) -> list[DecodingComparison]:
    arguments: dict[str, object] = {
        "exit_layers": [1, 2],
        "num_draft_tokens": [1, 3],
        "max_new_tokens": 9,
        "eos_token_ids": (),
        "time_limit_seconds": 60.0,
    }
    prompts = overrides.pop("prompts", _PROMPTS)
    return compare_decoding(decoder, prompts, **(arguments | overrides))  # type: ignore[arg-type]


def test_every_exit_is_compared_with_every_draft_length_on_every_prompt() -> None:
    comparisons = _compare(counting_decoder())
    assert [(c.exit_layer, c.num_draft_tokens) for c in comparisons] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert all(c.num_prompts == 3 and c.identical_share == 1.0 and c.acceptance_rate == 1.0 for c in comparisons)
    assert [c.mean_tokens_per_round for c in comparisons] == [2.0, 4.0, 2.0, 4.0]  # 8 tokens after the first


def test_figures_are_pooled_over_prompts() -> None:
    comparison = _compare(counting_decoder(misses=(9,)), exit_layers=[1], num_draft_tokens=[1])[0]
    assert comparison.acceptance_rate == pytest.approx((3 + 4 + 4) / 12)  # only the first prompt drafts after 9
    assert comparison.mean_tokens_per_round == pytest.approx(3 * 8 / (5 + 4 + 4))
    assert comparison.speedup == pytest.approx(
        comparison.self_speculative_tokens_per_second / comparison.autoregressive_tokens_per_second  # type: ignore[operator]
    )


def test_time_that_has_run_out_still_measures_one_prompt_and_says_so() -> None:
    comparisons = _compare(counting_decoder(), time_limit_seconds=0.0)
    assert {c.num_prompts for c in comparisons} == {1}
    assert comparison_table(comparisons).title.endswith(", 1 of 3 prompts")


def test_measuring_stops_after_the_prompt_during_which_the_limit_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(alternation, "perf_counter", lambda: float(next(ticks)))  # one second a prompt
    assert {c.num_prompts for c in _compare(counting_decoder(), time_limit_seconds=1.5)} == {2}


def test_parts_of_the_prompts_pool_to_the_whole_but_for_times() -> None:
    decoder = counting_decoder(misses=(9,))
    parts = [_compare(decoder, prompts=_PROMPTS[:1]), [], _compare(decoder, prompts=_PROMPTS[1:])]
    whole = _compare(decoder)
    for part, expected in zip(pool_comparisons(parts), whole, strict=True):
        assert replace(part, times=expected.times) == expected
        assert part.num_prompts == 3
    assert pool_comparisons(parts)[0].times == tuple(map(sum, zip(parts[0][0].times, parts[2][0].times, strict=True)))
    assert pool_comparisons([[], []]) == []


def test_outputs_that_end_at_their_first_token_have_no_speed_and_divide_nothing_by_zero() -> None:
    comparison = _compare(counting_decoder(), prompts=[[4]], eos_token_ids=(5,))[0]
    assert (comparison.speedup, comparison.acceptance_rate, comparison.mean_tokens_per_round) == (None, None, None)
    assert comparison_table([comparison]).title.endswith("decoding, 1 prompt")
    assert comparison_table([comparison]).rows == [("1", "1", "1 of 1")]


def test_the_table_has_a_row_for_each_setting() -> None:
    table = comparison_table(_compare(counting_decoder()))
    assert "3 prompts" in table.title
    assert [row[:2] for row in table.rows] == [("1", "1"), ("1", "3"), ("2", "1"), ("2", "3")]
    assert len(table.columns) == 9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"prompts": []}, "prompts: got '0 prompts'"),
        ({"exit_layers": [4]}, "exit_layer: got 4"),
        ({"exit_layers": [0]}, "exit_layer: got 0"),
        ({"num_draft_tokens": [0]}, "num_draft_tokens: got 0"),
    ],
)
def test_what_cannot_be_measured_is_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _compare(counting_decoder(), **overrides)
