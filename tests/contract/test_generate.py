"""`layerskip generate` as a user meets it."""

import io
import json
import os

import pytest
import torch

import app.generation.request
from app.decoding.engine import Decoding
from app.decoding.strategies import STRATEGIES
from app.model_files.decoding_defaults import DecodingDefaults, write_decoding_defaults
from tests.contract.conftest import PROMPT
from tests.support.processors import AVX2, AVX512_BF16, fake_processor
from tests.support.saved_models import save_model, write_prompts
from tests.support.tiny_models import tiny_llama
from tests.support.tokenizers import llama

CONTRACT = {
    "text", "tokens", "num_tokens", "seconds_prefill", "seconds_decode", "tokens_per_second", "acceptance_rate",
    "mean_tokens_per_round", "rounds", "drafted", "accepted",
}  # fmt: skip
FLAGS = {
    "autoregressive": [],
    "early_exit": ["--exit_layer", "2"],
    "self_speculative": ["--exit_layer", "2", "--num_draft_tokens", "3"],
    "draft_model": ["--draft_model", "DRAFT_MODEL", "--num_draft_tokens", "2"],
    "layer_skip": ["--skipped_layers", "[1,2]", "--num_draft_tokens", "2"],
    "n_gram": ["--n_gram_match", "1", "--fall_back", "false"],
}


def test_flags_are_tested_for_every_strategy():
    assert FLAGS.keys() == STRATEGIES.keys()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_json_is_one_object_with_the_contracts_keys_and_says_whether_it_is_lossless(generate, generate_json, strategy):
    (plain,) = generate_json("--strategy", "autoregressive", "--max_new_tokens", "20")
    (result,) = generate_json("--strategy", strategy, *FLAGS[strategy], "--max_new_tokens", "20")
    assert set(result) > CONTRACT
    assert result["num_tokens"] == len(result["tokens"]) == 20
    assert (result["strategy"], result["stop_reason"]) == (strategy, "max_new_tokens")
    assert result["lossless"] == (strategy != "early_exit") == (result["tokens"] == plain["tokens"])
    assert (result["acceptance_rate"] is None) == (strategy in ("autoregressive", "early_exit"))
    assert result["exit_layer"] == (2 if strategy in ("early_exit", "self_speculative") else None)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_text_goes_to_stdout_and_statistics_to_stderr(generate, generate_json, strategy):
    arguments = ["--strategy", strategy, *FLAGS[strategy], "--max_new_tokens", "30"]
    shown = generate(*arguments)
    assert shown.out == generate_json(*arguments)[0]["text"] + "\n"
    assert f"[{strategy}" in shown.err
    assert "30 tokens, stopped by max_new_tokens" in shown.err
    assert ("lossy" in shown.err) == (strategy == "early_exit")


def test_prompts_of_a_file_come_out_in_its_order_and_alike_for_every_batch_size(generate, generate_json, tmp_path):
    texts = ["the", "then more of the end, and more of it", "x = 1", "Grüße", "END"]
    file = write_prompts(tmp_path / "prompts.jsonl", texts)
    sampling = ["--temperature", "1.3", "--top_k", "50", "--seed", "7", *FLAGS["self_speculative"]]
    runs = [
        generate_json("--prompts", file, "--batch_size", size, *sampling, "--max_new_tokens", 12, prompt=None)
        for size in (1, 2, 5)
    ]
    tokens = [[result["tokens"] for result in results] for results in runs]
    assert [result["prompt"] for result in runs[1]] == texts
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(set(map(tuple, tokens[0]))) == 5
    alone = generate_json(*sampling, "--max_new_tokens", 12, prompt="the")
    assert alone[0]["tokens"] == tokens[0][0]  # the first row draws as a single prompt does

    shown = generate("--prompts", file, "--batch_size", 2, "--max_new_tokens", 4, prompt=None)
    assert [line for line in shown.out.splitlines() if line.startswith("[")][:2] == ["[1/5] the", f"[2/5] {texts[1]}"]
    assert "5 prompts, 20 tokens" in shown.err


def test_the_same_prompt_twice_in_a_file_is_sampled_differently(generate_json, tmp_path):
    file = write_prompts(tmp_path / "prompts.jsonl", ["the"] * 3)
    results = generate_json("--prompts", file, "--temperature", "1.5", "--max_new_tokens", "12", prompt=None)
    assert len({tuple(result["tokens"]) for result in results}) == 3


def test_a_seed_gives_the_same_sample_again_and_another_one_another(generate_json):
    sampling = ["--temperature", "1.5", "--top_k", "50", "--top_p", "0.99", "--min_p", "0.001"]
    outputs = [generate_json(*sampling, "--seed", seed)[0]["tokens"] for seed in (1, 1, 2)]
    assert outputs[0] == outputs[1] != outputs[2]


def test_repetition_penalty_changes_the_output_and_keeps_it_lossless(generate_json):
    plain, penalised, speculative = (
        generate_json("--max_new_tokens", "40", *arguments)[0]["tokens"]
        for arguments in (
            ["--strategy", "autoregressive"],
            ["--strategy", "autoregressive", "--repetition_penalty", "1.8"],
            ["--strategy", "self_speculative", *FLAGS["self_speculative"], "--repetition_penalty", "1.8"],
        )
    )
    assert plain != penalised == speculative
    assert len(set(penalised)) > len(set(plain))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stop_string_ends_the_output_with_the_token_that_completes_it(generate_json, strategy):
    arguments = ["--strategy", strategy, *FLAGS[strategy], "--max_new_tokens", "40", "--repetition_penalty", 2]
    (whole,) = generate_json(*arguments)
    text = whole["text"]
    stop = next(text[i : i + 2] for i in range(9, len(text)) if "\N{REPLACEMENT CHARACTER}" not in text[i : i + 2])
    (result,) = generate_json(*arguments, "--stop", "never to be seen", stop)
    assert (result["stop_reason"], stop in result["text"]) == ("stop", True)
    assert result["tokens"] == whole["tokens"][: result["num_tokens"]]
    assert 1 < result["num_tokens"] < 40


def test_a_budget_of_0_prints_statistics_and_no_text(generate, generate_json, tmp_path):
    file = write_prompts(tmp_path / "prompts.jsonl", ["the", "end"])
    for arguments in (["--prompt", "the"], ["--prompts", file]):
        shown = generate(*arguments, "--max_new_tokens", 0, prompt=None)
        assert shown.out == ""
        assert "0 tokens" in shown.err
        results = generate_json(*arguments, "--max_new_tokens", 0, prompt=None)
        assert {(*result["tokens"], result["text"]) for result in results} == {("",)}


def test_characters_that_stdout_cannot_encode_are_replaced(generate, generate_json, monkeypatch):
    (result,) = generate_json()
    assert not result["text"].isascii()
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    generate()
    assert stdout.buffer.getvalue().decode("ascii") == result["text"].encode("ascii", "replace").decode() + "\n"


def test_chat_puts_the_prompt_into_the_template(generate_json, tmp_path):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    chatty = save_model(tmp_path, chat_template=template)
    (chat,) = generate_json("--chat", "true", model=chatty)
    (by_hand,) = generate_json(model=chatty, prompt=f"<user>{PROMPT}\n<a>")
    (without,) = generate_json(model=chatty)
    assert chat["tokens"] == by_hand["tokens"] != without["tokens"]


def test_untuned_defaults_are_a_quarter_of_the_blocks_and_3_drafts(generate):
    shown = generate("--json")
    result = json.loads(shown.out)
    assert (result["strategy"], result["exit_layer"], result["num_draft_tokens"]) == ("self_speculative", 1, 3)
    assert "exit_layer 1 of 4 (untuned), num_draft_tokens 3 (untuned); layerskip tune finds" in shown.err
    nothing_open = generate("--strategy", "self_speculative", *FLAGS["self_speculative"])
    assert "defaults" not in nothing_open.err


def test_tuned_defaults_are_used_and_said(generate, generate_json, tmp_path):
    tuned = save_model(tmp_path)
    costs = {"head": 1.0, "extra_token": 0.02, "overhead": 0.1}
    write_decoding_defaults(
        tuned,
        DecodingDefaults(strategy="self_speculative", exit_layer=3, num_draft_tokens=5, measured_speedup=1.25, **costs),
    )
    shown = generate("--json", model=tuned)
    result = json.loads(shown.out)
    assert (result["strategy"], result["exit_layer"], result["num_draft_tokens"]) == ("self_speculative", 3, 5)
    assert "num_draft_tokens 5 (tuned); layerskip tune measured a speedup of 1.25" in shown.err
    (other_exit,) = generate_json("--exit_layer", "2", model=tuned)
    assert (other_exit["exit_layer"], other_exit["num_draft_tokens"]) == (2, 3)

    write_decoding_defaults(tuned, DecodingDefaults(strategy="autoregressive", **costs))
    assert generate_json(model=tuned)[0]["strategy"] == "autoregressive"
    assert generate_json("--num_draft_tokens", "2", model=tuned)[0]["strategy"] == "self_speculative"


def test_tuned_costs_reach_the_engine(generate, tmp_path, monkeypatch):
    tuned = save_model(tmp_path)
    defaults = DecodingDefaults(
        strategy="self_speculative", exit_layer=3, num_draft_tokens=5, head=2.0, extra_token=0.5, overhead=0.25
    )
    write_decoding_defaults(tuned, defaults)
    seen = []

    def spy(*args, settings, **options):
        seen.append(settings.costs)
        return Decoding(*args, settings=settings, **options)

    monkeypatch.setattr(app.generation.request, "Decoding", spy)
    generate(model=tuned)
    generate("--strategy", "autoregressive", model=tuned)
    assert (seen[0].plain_step, seen[0].draft_step, seen[0].extra_token, seen[0].overhead) == (6.0, 5.0, 0.5, 0.25)
    assert seen[1] is None


def test_dtype_defaults_to_the_checkpoints_own_and_bf16_says_what_it_means(generate, tmp_path, monkeypatch):
    fake_processor(monkeypatch, AVX512_BF16, "AVX512")
    half = save_model(tmp_path, dtype=torch.bfloat16)
    said = "bfloat16: where two tokens tie, the output can differ from decoding one token at a time"
    assert said in generate("--strategy", "self_speculative", model=half).err
    assert said not in generate("--strategy", "autoregressive", model=half).err
    assert said not in generate("--dtype", "float32", model=half).err


def test_a_dtype_that_the_processor_emulates_is_left_by_itself_and_warned_of_where_chosen(
    generate, generate_json, tmp_path, monkeypatch
):
    fake_processor(monkeypatch, AVX2, "AVX2")
    half = save_model(tmp_path, dtype=torch.bfloat16)
    here = generate_json("--strategy", "autoregressive", "--max_new_tokens", "20", model=half)
    exact = generate_json("--strategy", "autoregressive", "--max_new_tokens", "20", "--dtype", "float32", model=half)
    assert here[0]["tokens"] == exact[0]["tokens"]
    said = generate(model=half).err
    assert "model: weights become float32, in twice the memory, since AMD EPYC emulates bfloat16" in said
    assert "model: AMD EPYC emulates float16" in generate("--dtype", "float16", model=half).err
    assert "emulates" not in generate("--dtype", "float32", model=half).err


def test_options_without_effect_are_said(generate, draft_model):
    err = generate(
        "--strategy", "autoregressive", "--exit_layer", 2, "--batch_size", 3, "--draft_model", draft_model
    ).err
    for said in ("batch_size=3 has no effect", "exit_layer=2 has no effect", "draft_model="):
        assert said in err


def test_texts_are_taken_as_they_are_written(generate_json, tmp_path):
    for prompt in ("null", "#include <a>", " [1, 2] ", "'x'", "{a: b}"):
        assert generate_json("--stop", "#", "~", prompt=prompt)[0]["prompt"] == prompt
    file = tmp_path / "options.yaml"
    file.write_text("stop: ['#', \"\\n\"]\nprompt: 'null'\n")
    assert generate_json("--config", file, prompt=None)[0]["prompt"] == "null"


def test_every_prompt_and_every_stop_that_is_given_counts(generate, generate_json):
    texts, options = ["one", "another"], ["--strategy", "autoregressive", "--stop", "a", "--stop", "e", "i"]
    alone = [generate_json(*options, prompt=text)[0] for text in texts]
    both = generate_json(*options, "--prompt", texts[1], prompt=texts[0])
    assert [each["tokens"] for each in both] == [each["tokens"] for each in alone]
    assert [each["tokens"] for each in alone] == [
        generate_json("--strategy", "autoregressive", "--stop", "a", "e", "i", prompt=text)[0]["tokens"]
        for text in texts
    ]
    assert "[2/2] another" in generate("--prompt", texts[1], prompt=texts[0]).out


def test_code_by_a_llama_tokenizer_that_ends_texts_itself_is_indented_and_ends(generate, generate_json, tmp_path):
    """Its prompt begins with `<s>` and has no `</s>`; its text keeps the space that decoding it alone would drop."""
    tokenizer = llama(add_eos_token=True)
    tokenizer.save_pretrained(tmp_path)
    pieces = ["<0x0A>", "▁▁▁▁", "re", "t", "u", "r", "n", "▁x", "</s>"]
    knows = tokenizer.convert_tokens_to_ids(pieces)
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, tied=False)
    with torch.no_grad():  # what follows a token depends on it alone
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[knows[1:]] = model.model.embed_tokens.weight[knows[:-1]]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path)
    options = {"prompt": "def f(x):\n", "model": tmp_path}
    (result,) = generate_json("--exit_layer", 2, **options)
    assert (result["tokens"], result["text"], result["stop_reason"]) == (knows[1:], "    return x", "eos")
    assert generate("--exit_layer", 2, **options).out == "    return x\n"
    (stopped,) = generate_json("--exit_layer", 2, "--stop", "    r", **options)
    assert (stopped["text"], stopped["stop_reason"]) == ("    re", "stop")


def test_prompts_from_a_pipe_are_read_once(generate_json):
    reading, writing = os.pipe()
    os.write(writing, b'{"prompt": "the"}\n{"prompt": "end"}\n')
    os.close(writing)
    results = generate_json("--prompts", f"/dev/fd/{reading}", "--max_new_tokens", "2", prompt=None)
    os.close(reading)
    assert [result["prompt"] for result in results] == ["the", "end"]
