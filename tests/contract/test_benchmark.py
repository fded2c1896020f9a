"""`layerskip benchmark` as its user meets it: the report, the table and the figure, and every mistake before work."""

import json

import pytest
import torch

from app.decoding import acceptance
from app.spans.decoder import SpanDecoder
from tests.support.runs import cli, measure_costs_once
from tests.support.saved_models import save_model, write_prompts
from tests.support.tokenizers import byte_level

TEXTS = ["the end of", "naïve café", "then more", "def f(x):\n    return"]
CONTRACT = {
    "strategy", "exit_layer", "num_draft_tokens", "tokens_per_second", "seconds_per_token", "acceptance_rate",
    "mean_tokens_per_round", "speedup", "identical_to_autoregressive",
}  # fmt: skip
DRAFTING = ["--exit_layers", "[1, 2]", "--num_draft_tokens", "[2]"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two models with one tokenizer, one with another, and prompts."""
    root = tmp_path_factory.mktemp("benchmark")
    for name, settings in (("model", {"num_layers": 3}), ("small", {"num_layers": 1, "seed": 1}), ("other", {})):
        tokenizer = byte_level(vocab_size=310 if name == "other" else 330)
        save_model(root / name, tokenizer=tokenizer, max_length=64, **settings)
    write_prompts(root / "prompts.jsonl", TEXTS)
    return root


@pytest.fixture
def benchmark(root, tmp_path, monkeypatch, capsys):
    """Run the verb in the folder of models; its report, and its streams."""

    measure_costs_once(monkeypatch)

    def run(*options, status=0):
        monkeypatch.chdir(root)
        output = tmp_path / "report.json"
        defaults = {
            "--model": "model", "--prompts": "prompts.jsonl", "--output": str(output), "--max_new_tokens": "8",
            "--limit": "2", "--repeats": "1", "--strategies": "[autoregressive]",
            "--overwrite": "true",
        }  # fmt: skip
        given = dict(zip(options[::2], options[1::2], strict=True))
        capsys.readouterr()
        arguments = [part for pair in (defaults | given).items() for part in pair]
        assert cli(monkeypatch, "benchmark", *arguments) == status
        report = json.loads(output.read_text()) if output.exists() else None
        return report, capsys.readouterr()

    return run


def test_every_strategy_is_reported_and_all_lossless_ones_give_the_same_tokens(benchmark, tmp_path):
    every = "[early_exit,self_speculative,draft_model,layer_skip,n_gram,transformers,transformers_early_exit]"
    report, streams = benchmark(
        "--strategies", every, "--draft_model", "small", "--skipped_layers", "[1]", "--repeats", "2",
        "--n_gram_match", "[1]", *DRAFTING
    )  # fmt: skip
    found = [result for result in report["results"] if result["n_gram_match"] is not None]
    assert [(r["strategy"], r["exit_layer"]) for r in found] == [
        ("self_speculative", 1), ("self_speculative", 2), ("draft_model", None), ("layer_skip", None), ("n_gram", None)
    ]  # fmt: skip
    for result in found:
        assert result["identical_to_autoregressive"] == 1.0
        assert 0 < result["drafted_by_n_gram"] <= result["drafted"]
        assert (result["drafted_by_n_gram"] == result["drafted"]) == (result["strategy"] == "n_gram")
        assert result["predicted_speedup"] is None
        assert (result["predicted_speedup_from_rounds"] is not None) == (result["strategy"] != "draft_model")
    assert "n-gram" in streams.out
    results = [result for result in report["results"] if result["n_gram_match"] is None]
    assert [(r["strategy"], r["exit_layer"], r["num_draft_tokens"]) for r in results] == [
        ("autoregressive", None, None), ("early_exit", 1, None), ("early_exit", 2, None), ("self_speculative", 1, 2),
        ("self_speculative", 2, 2), ("draft_model", None, 2), ("layer_skip", None, 2), ("transformers", None, None),
        ("transformers_early_exit", 1, 2), ("transformers_early_exit", 2, 2),
    ]  # fmt: skip
    for result in results:
        assert set(result) > CONTRACT
        assert result["num_prompts"] == 2
        assert result["seconds_per_token"] > 0
        assert result["speedup_min"] <= result["speedup"] * 1.0001
        assert (result["identical_to_autoregressive"] == 1.0) == (result["strategy"] != "early_exit")
        drafts = result["strategy"] in ("self_speculative", "draft_model", "layer_skip")
        assert (result["acceptance_rate"] is not None) == drafts
        assert (result["predicted_speedup_from_rounds"] is not None) == (drafts and result["strategy"] != "draft_model")
    assert results[0]["speedup"] == 1.0
    assert results[3]["speedup_vs_transformers_early_exit"] is not None
    assert set(report) == {
        "environment", "settings", "costs", "draft_model_costs", "results", "notes",
    }  # fmt: skip
    assert report["settings"]["num_draft_tokens"] == [2]
    assert report["environment"]["dtype"] == "float32"
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "transformers_early_exit" in streams.out
    assert "note: early_exit is lossy" in streams.out
    assert "Passing `generation_config`" not in streams.err


def test_a_batch_gives_each_prompt_the_tokens_it_has_alone(benchmark):
    options = ("--strategies", "[self_speculative,transformers]", "--limit", "4", *DRAFTING)
    alone, _ = benchmark(*options)
    together, streams = benchmark(*options, "--batch_size", "3")
    for one, many in zip(alone["results"], together["results"], strict=True):
        assert many["identical_to_autoregressive"] == 1.0
        assert (many["num_tokens"], many["drafted"], many["accepted"]) == (
            one["num_tokens"], one["drafted"], one["accepted"]
        )  # fmt: skip
    assert "batch size 3" in streams.out


def test_outputs_end_where_the_model_ends_them_unless_told_to_go_on(benchmark, root):
    config = root / "model" / "generation_config.json"
    before = config.read_text()
    try:
        config.write_text(json.dumps({"eos_token_id": list(range(0, 300, 2))}))
        ended, _ = benchmark("--max_new_tokens", "30", "--strategies", "[self_speculative,transformers]", *DRAFTING)
        on, _ = benchmark("--max_new_tokens", "30", "--ignore_eos", "true")
    finally:
        config.write_text(before)
    assert {result["num_tokens"] for result in ended["results"]} == {ended["results"][0]["num_tokens"]}
    assert ended["results"][0]["num_tokens"] < on["results"][0]["num_tokens"] == 60


def test_bfloat16_is_measured_as_it_is(benchmark):
    report, streams = benchmark(
        "--dtype", "bfloat16", "--strategies", "[self_speculative]", "--limit", "4", "--max_new_tokens", "40", *DRAFTING
    )
    assert report["environment"]["dtype"] == "bfloat16"
    for result in report["results"]:
        assert result["identical_to_autoregressive"] == 1.0 - result["num_differing"] / 4
        assert (result["largest_logit_gap"] is None) == (result["num_differing"] == 0)
    most = max(result["num_differing"] for result in report["results"])
    assert (f"outputs of up to {most} of 4 prompts differ" in streams.out) == (most > 0) == bool(report["notes"])


def test_a_wrong_token_in_float32_is_loudly_told(benchmark, monkeypatch):
    honest = acceptance.accept_greedy

    def broken(drafts, choices):
        accepted, token = honest(drafts, choices)
        return accepted, (token + 1) % 330 if drafts else token

    monkeypatch.setattr(acceptance, "accept_greedy", broken)
    report, streams = benchmark("--strategies", "[self_speculative]", *DRAFTING)
    wrong = report["results"][1]
    assert (wrong["num_differing"], wrong["num_unexplained"]) == (2, 2)
    assert wrong["largest_logit_gap"] > 0.01
    assert (
        "WARNING: self_speculative, exit 1, drafts 2: outputs differ from autoregressive decoding, 2 of" in streams.err
    )
    assert "note: WARNING: up to 2 of them by more than rounding explains in float32: please report it" in streams.out
    assert "2 of 2" in streams.out


def test_policies_and_threads_are_used(benchmark):
    adaptive = ("--strategies", "[self_speculative]", "--draft_policy", "adaptive", "--fall_back", "true")
    report, _ = benchmark(*adaptive, "--threads", "1", *DRAFTING)
    assert report["environment"]["threads"] == 1
    assert report["settings"]["draft_policy"] == "adaptive"
    assert report["results"][1]["predicted_speedup"] is None
    off, _ = benchmark("--strategies", "[self_speculative]", "--draft_policy", "off", *DRAFTING)
    assert off["results"][1]["drafted"] == 0


MISTAKES = [
    (["--strategies", "[fast]"], "strategies: got fast, allowed autoregressive | early_exit"),
    (["--strategies", "[]"], "strategies: got [], allowed at least one"),
    (["--strategies", "layer_skip"], "strategies: got layer_skip, allowed list; write [layer_skip]"),
    (["--strategies", "[self_speculative]", "--num_draft_tokens", "[2]"], "exit_layers: got [], allowed at least one"),
    (["--strategies", "[self_speculative]", "--exit_layers", "[2]"], "num_draft_tokens: got [], allowed at least one"),
    (["--strategies", "[self_speculative]", "--exit_layers", "[1, 3]", "--num_draft_tokens", "[2]"],
     "exit_layers: got 3, allowed [1, 2]"),
    (["--strategies", "[self_speculative]", "--exit_layers", "[2]", "--num_draft_tokens", "[0]"],
     "num_draft_tokens: got 0"),
    (["--strategies", "[layer_skip]", "--num_draft_tokens", "[2]"], "skipped_layers: got"),
    (["--strategies", "[draft_model]", "--num_draft_tokens", "[2]"], "draft_model: got None, allowed a model"),
    (["--strategies", "[draft_model]", "--num_draft_tokens", "[2]", "--draft_model", "other"], "draft_model: got"),
    (["--strategies", "[transformers_early_exit]", *DRAFTING, "--batch_size", "2"],
     "batch_size: got 2, allowed 1 with strategy transformers_early_exit"),
    (["--max_new_tokens", "1"], "max_new_tokens: got 1"),
    (["--limit", "0"], "limit: got 0"),
    (["--repeats", "0"], "repeats: got 0"),
    (["--time_limit_seconds", "-1"], "time_limit_seconds: got -1"),
    (["--threads", "0"], "threads: got 0"),
    (["--device", "tpu"], "device: got tpu, allowed auto | cpu | cuda"),
    (["--dtype", "int8"], "dtype: got int8, allowed"),
    (["--model", "no/such/folder"], "model: got 'no/such/folder'"),
    (["--prompts", "absent.jsonl"], "absent.jsonl cannot be read"),
    (["--output", "absent/report.json"], "output: got 'absent/report.json'"),
    (["--output", "report.txt"], "output: got 'report.txt'"),
    (["--foo", "1"], "foo: unknown key"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_ends_with_status_2_and_names_the_field_before_anything_is_decoded(
    benchmark, monkeypatch, options, message
):
    monkeypatch.setattr(SpanDecoder, "run_blocks", lambda *_, **__: pytest.fail("a block ran"))
    report, streams = benchmark(*options, status=2)
    assert report is None
    assert message in streams.err
    assert "Traceback" not in streams.err
    assert streams.out == ""


def test_ctrl_c_ends_with_status_130_and_leaves_no_report(benchmark, monkeypatch):
    calls = []

    def run_blocks(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return honest(*args, **kwargs)

    honest = SpanDecoder.run_blocks
    monkeypatch.setattr(SpanDecoder, "run_blocks", run_blocks)
    report, streams = benchmark(status=130)
    assert report is None
    assert "Traceback" not in streams.err


@pytest.mark.gpu
def test_on_a_gpu_the_same_tokens_come_out(benchmark):
    assert torch.cuda.is_available()
    report, _ = benchmark("--strategies", "[self_speculative,transformers]", "--device", "cuda", *DRAFTING)
    assert {result["identical_to_autoregressive"] for result in report["results"]} == {1.0}
