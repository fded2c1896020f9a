"""`layerskip tune` as its user meets it: what it prints, what it stores, and what it refuses before it starts."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.decoding.cost_model import CostModel
from app.generation.loaded_model import load_decoder
from app.model_files.decoding_defaults import Conditions, read_decoding_defaults
from app.tuning import result as tuning_result
from app.tuning import tune as tuning
from tests.support.checkpoints import write_checkpoint
from tests.support.runs import cli
from tests.support.saved_models import write_prompts
from tests.support.tiny_models import tiny_llama
from tests.support.tokenizers import byte_level

QUICK = ["--max_new_tokens", "12", "--max_draft_tokens", "3", "--num_verified", "2", "--repeats", "1", "--limit", "2"]
QUICK += ["--n_gram_match", "[]"]
TEXTS = ["the end of", "naïve café", "then more"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model as a directory and as a Lightning checkpoint, and prompts."""
    root = tmp_path_factory.mktemp("tune")
    model, tokenizer = tiny_llama(seed=1, vocab_size=330, tied=False, num_layers=3), byte_level()
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write_checkpoint(root / "run.ckpt", model, tokenizer)
    write_prompts(root / "prompts.jsonl", TEXTS)
    return root


@pytest.fixture
def here(root, tmp_path, monkeypatch):
    """A copy that may be changed, as the working directory."""
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(tuning_result, "FEWEST_PROMPTS", 2)
    monkeypatch.setattr(tuning_result, "FEWEST_TOKENS", 22)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def speedup(monkeypatch):
    """Lets the test say what was measured, by each run: tiny models run at the noise of the machine."""
    costs = tuning.DecodingCosts(
        block_seconds=1e-3, head=1.0, draft_head=1.0, first_extra=0.0, extra_token=0.1, overhead=0.0
    )

    def measure(decoder, **_):
        return costs if decoder.draft_vocabulary is None else replace(costs, draft_head=0.1)

    monkeypatch.setattr(tuning, "measure_decoding_costs", measure)
    honest = tuning._verification

    def measured(value, again=None):
        repeats = {1: value, 5: value if again is None else again}  # QUICK verifies once and confirms five times

        def scaled(*args, **kwargs):
            run = honest(*args, **kwargs)
            value = repeats[len(args[1].runs[0])]
            given = {"speedup": value, "speedup_range": (value, value), "interval": (value, value)}
            return type(run)(**run.__dict__ | given)

        monkeypatch.setattr(tuning, "_verification", scaled)

    return measured


def _tune(monkeypatch, model, *options):
    return cli(monkeypatch, "tune", "--model", model, "--prompts", "prompts.jsonl", *QUICK, *options)


def test_the_choice_is_printed_with_its_reasons_and_stored_with_the_model(here, monkeypatch, capsys, speedup):
    speedup(1.7, again=1.5)
    assert _tune(monkeypatch, "model") == 0
    out = capsys.readouterr().out
    stored = read_decoding_defaults(AutoModelForCausalLM.from_pretrained("model"))
    assert stored.strategy == "self_speculative"
    assert stored.measured_speedup == 1.5
    assert stored.conditions == Conditions(dtype="float32", device_type="cpu", threads=torch.get_num_threads())
    assert stored.exit_layer in (1, 2)
    where = f"exit {stored.exit_layer} with {stored.num_draft_tokens} draft"
    assert f"decision: self_speculative, {where}" in out
    assert re.search("the fastest of [34] settings run", out)  # one or two of them with drafts of changing length
    assert "confirmed, measured 1.500x" in out
    assert " again │" in out
    assert max(map(len, out[: out.index("costs:")].splitlines())) <= 120
    assert "…" not in out
    assert "stored in model/generation_config.json" in out
    flags = f"--exit_layer {stored.exit_layer} --num_draft_tokens {stored.num_draft_tokens}"
    assert f"layerskip generate --model model --strategy self_speculative {flags}" in out
    for column in ("agreement", "best drafts", "acceptance", "tokens/round", "predicted", "measured", "differ"):
        assert column in out
    assert "3 (full, one pass)" in out
    assert "costs: a block takes" in out


def test_rounded_weights_are_tuned_as_such_and_generate_tells_where_others_are_used(here, monkeypatch, capsys, speedup):
    speedup(1.7, again=1.5)
    rounded = ["--quantization", "int8", "--dtype", "bfloat16"]
    assert _tune(monkeypatch, "model", *rounded) == 0
    stored = read_decoding_defaults(AutoModelForCausalLM.from_pretrained("model"))
    assert stored.conditions.dtype == "int8 weights in bfloat16"
    asked = ["--model", "model", "--prompt", "the end", "--max_new_tokens", "2"]
    for given, differs in ((rounded, False), (rounded[2:], True)):
        capsys.readouterr()
        assert cli(monkeypatch, "generate", *asked, *given) == 0
        said = "it was tuned for int8 weights in bfloat16 on cpu"
        assert (said in capsys.readouterr().err) is differs


def test_n_grams_are_run_beside_what_has_none_and_stored(here, monkeypatch, capsys, speedup):
    speedup(1.7, again=1.5)
    assert _tune(monkeypatch, "model", "--n_gram_match", "[1]") == 0
    out = capsys.readouterr().out
    stored = read_decoding_defaults(AutoModelForCausalLM.from_pretrained("model"))
    assert stored.n_gram_match == 1
    assert stored.n_gram_max_drafts in (4, 8, 16)
    assert "with n-grams" in out
    assert f"n-grams of 1 with at most {stored.n_gram_max_drafts}: the fastest of " in out
    assert f"--n_gram_match 1 --n_gram_max_drafts {stored.n_gram_max_drafts}" in out
    assert max(map(len, out[: out.index("costs:")].splitlines())) <= 120


def test_the_size_of_the_draft_vocabulary_is_chosen_stored_and_taken_by_default(here, monkeypatch, capsys, speedup):
    speedup(1.7, again=1.5)
    ends = load_decoder("model", dtype="auto", device="cpu").eos_token_ids
    listed = [*ends, *sorted(set(range(329)) - {*ends})]
    (here / "ids.json").write_text(json.dumps(listed))
    assert _tune(monkeypatch, "model", "--draft_vocabulary", "ids.json") == 0
    out = capsys.readouterr().out
    stored = json.loads((here / "model/generation_config.json").read_text())["layerskip"]
    size = stored["draft_vocabulary_size"]
    assert size in (len(listed), len(listed) // 2, len(listed) // 4)
    assert f" of {size} ids" in out
    assert re.search(rf"H_d with fewer ids: 0\.\d\d with {len(listed)}, ", out)
    assert max(map(len, out[: out.index("costs:")].splitlines())) <= 120
    assert load_decoder("model", dtype="auto", device="cpu").decoder.draft_vocabulary == tuple(listed[:size])
    assert _tune(monkeypatch, "model", "--draft_vocabulary", "none") == 0
    assert "ids" not in capsys.readouterr().out.partition("decision")[2]
    assert load_decoder("model", dtype="auto", device="cpu").decoder.draft_vocabulary is None
    assert _tune(monkeypatch, "model", "--json") == 0, "the whole list is considered, whatever was stored"
    report = json.loads(capsys.readouterr().out)
    assert [int(name) for name in report["draft_heads"]] == [len(listed), len(listed) // 2, len(listed) // 4]


def test_a_model_that_drafts_slow_down_is_stored_as_autoregressive(here, monkeypatch, capsys, speedup):
    speedup(1.5)
    assert _tune(monkeypatch, "model") == 0
    assert "assistant_early_exit" in json.loads((here / "model/generation_config.json").read_text())
    speedup(0.99)
    assert _tune(monkeypatch, "model") == 0
    assert "decision: autoregressive: even exit" in capsys.readouterr().out
    content = json.loads((here / "model/generation_config.json").read_text())
    assert content["layerskip"]["strategy"] == "autoregressive"
    assert "assistant_early_exit" not in content
    assert "num_assistant_tokens" not in content


def test_json_is_one_object_on_stdout_and_progress_goes_to_stderr(here, monkeypatch, capsys):
    assert _tune(monkeypatch, "model", "--json", "--dtype", "float32") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    stored = json.loads((here / "model/generation_config.json").read_text())["layerskip"]
    assert {name: report[name] for name in stored} == stored
    assert report["stored"] == "model/generation_config.json"
    assert report["num_prompts"] == 2
    assert report["num_positions"] == 22
    assert set(report["costs"]) == {"block_seconds", "head", "draft_head", "first_extra", "extra_token", "overhead"}
    assert [entry["exit_layer"] for entry in report["exits"]] == [1, 2, 3]
    assert report["exits"][2] == {"exit_layer": 3, "agreement": 1.0, "best": None, "best_with_n_grams": None}
    assert {entry["best"]["exit_layer"] for entry in report["exits"][:2]} == {1, 2}
    assert all(run["identical_to_autoregressive"] == 1.0 for run in report["verified"])
    assert all(run["differences"]["num_differing"] == 0 for run in report["verified"])
    assert 1 <= len(report["verified"]) <= 2 + 2  # and two with drafts of changing length
    assert len(report["confirmed"]) <= 2
    assert report["conditions"]["dtype"] == "float32"
    assert report["environment"]["dtype"] == "float32"
    assert "verification: run 2 of 2" in captured.err


def test_what_cannot_hold_the_choice_is_left_alone_and_the_way_to_store_it_is_named(here, monkeypatch, capsys):
    before = (here / "run.ckpt").read_bytes()
    assert _tune(monkeypatch, "run.ckpt") == 0
    out = capsys.readouterr().out
    assert "not stored: a .ckpt cannot hold it; layerskip export --model run.ckpt makes a directory" in out
    assert "layerskip generate --model run.ckpt --strategy" in out
    assert (here / "run.ckpt").read_bytes() == before


def test_store_false_changes_no_file(here, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in (here / "model").iterdir()}
    assert _tune(monkeypatch, "model", "--store", "false") == 0
    assert "not stored (store=false)" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (here / "model").iterdir()} == before


def test_the_answer_is_printed_even_if_it_cannot_be_stored(here, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("app.whole_file.os.fsync", full)
    assert _tune(monkeypatch, "model") == 2
    captured = capsys.readouterr()
    assert "decision: " in captured.out
    assert "error: cannot write model/generation_config.json" in captured.err


MISTAKES = [
    (["--model", "absent.ckpt"], "model: got 'absent.ckpt'"),
    (["--prompts", "absent.jsonl"], "prompts: absent.jsonl cannot be read"),
    (["--prompts", "broken.jsonl"], "broken.jsonl, line 2"),
    (["--limit", "0"], "limit: got 0, allowed [1, inf)"),
    (["--max_new_tokens", "1"], "max_new_tokens: got 1, allowed [2, inf)"),
    (["--max_draft_tokens", "0"], "max_draft_tokens: got 0, allowed [1, inf)"),
    (["--num_verified", "0"], "num_verified: got 0, allowed [1, inf)"),
    (["--n_gram_max_drafts", "[]"], "n_gram_max_drafts: got 0, allowed [1, inf)"),
    (["--n_gram_match", "[0]"], "n_gram_match: got 0, allowed [1, inf); [] leaves n-grams out"),
    (["--repeats", "0"], "repeats: got 0, allowed [1, inf)"),
    (["--time_limit_seconds", "-1"], "time_limit_seconds: got -1.0, allowed [0.0, inf)"),
    (["--threads", "0"], "threads: got 0, allowed [1, "),
    (["--dtype", "int8"], "dtype: got int8, allowed auto | float32 | bfloat16 | float16"),
    (["--store", "perhaps"], "store: got perhaps, allowed"),
    (["--batch_size", "2"], "batch_size: unknown key"),
    (["--model", "damaged"], "damaged/generation_config.json: unreadable or damaged"),
    (["--model", "short"], "prompt 1: got"),
    (["--model", "shallow"], "model: got 'one block', allowed at least two, to draft from some of them; one block"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_ends_with_status_2_before_anything_is_decoded(here, monkeypatch, capsys, arguments, message):
    (here / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    for name, overrides in (("damaged", {}), ("short", {"max_length": 3}), ("shallow", {"num_layers": 1})):
        if name in arguments:
            shutil.copytree(here / "model", here / name)
            tiny_llama(vocab_size=330, **overrides).save_pretrained(here / name)
    if "damaged" in arguments:
        (here / "damaged/generation_config.json").write_text("{")
    monkeypatch.setattr("app.tuning.layer_agreement.decode_batch", None)
    assert _tune(monkeypatch, "model", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err[captured.err.index("error:") :].strip().splitlines()) <= 2
    assert not captured.out


def test_a_directory_that_cannot_be_written_to_is_refused_before_anything_is_decoded(here, monkeypatch, capsys):
    monkeypatch.setattr("app.cli.tune.os.access", lambda path, mode: False)
    monkeypatch.setattr("app.tuning.layer_agreement.decode_batch", None)
    assert _tune(monkeypatch, "model") == 2
    assert "model: got 'model', allowed a directory that can be written to" in capsys.readouterr().err


def test_nothing_below_one_is_recommended_whatever_was_measured(here, monkeypatch, capsys):
    assert _tune(monkeypatch, "model", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    held = [run["speedup"] for run in report["confirmed"] if run["holds"]]
    assert report["strategy"] == ("self_speculative" if held else "autoregressive")
    assert report["measured_speedup"] == (held[0] if held else None)
    assert (report["measured_speedup"] or 1.0) >= 1.0


def test_a_lead_that_is_gone_when_run_again_is_neither_stored_nor_hidden(here, monkeypatch, capsys, speedup):
    speedup(2.75)
    assert _tune(monkeypatch, "model", "--limit", "1") == 0
    assert "not stored: there is no decision" in (out := capsys.readouterr().out)
    assert out.count("ran at 2.75x on 1 prompt and 11 tokens; a choice takes at least 2 prompts and 22 tokens") == 1
    assert not (here / "model/generation_config.json").exists() or "layerskip" not in json.loads(
        (here / "model/generation_config.json").read_text()
    )
    speedup(1.003, again=0.98)
    assert _tune(monkeypatch, "model") == 0
    out = capsys.readouterr().out
    assert "decision: autoregressive: no setting kept its lead when it was run again" in out
    assert out.count("not confirmed, measured 0.980x") == 2  # the runner-up had its turn
    assert json.loads((here / "model/generation_config.json").read_text())["layerskip"]["strategy"] == "autoregressive"


# Drafts cost nothing, and every one of them gains.
CHEAP = CostModel(plain_step=1.0, draft_step=0.0, draft_tail=0.0, verify=1.0, extra_token=0.0)


def test_a_best_draft_length_at_the_edge_is_told_with_what_to_do(here, monkeypatch, capsys):
    monkeypatch.setattr(tuning.DecodingCosts, "cost_model", lambda *_, **__: CHEAP)
    assert _tune(monkeypatch, "model") == 0
    assert "the most that was looked at: raise --max_draft_tokens" in capsys.readouterr().out
