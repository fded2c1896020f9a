"""What goes wrong with `layerskip generate`: a user's mistake, a model that will not do, Ctrl-C."""

import errno
import io
import os
import signal
import sys
from multiprocessing import get_context

import pytest

from app.cli.main import main
from app.decoding.engine import Decoding
from datamodules.loading.tokenizers import train_byte_level_bpe
from tests.contract.conftest import PROMPT
from tests.support.saved_models import save_model, write_prompts

MISTAKES = {
    "empty prompt": (["--prompt", ""], "prompt: got '', allowed at least one character"),
    "neither": ([], "prompt: got None, allowed at least one character; or prompts, a file of them"),
    "both": (["--prompt", "a", "--prompts", "FILE"], "FILE', allowed either prompt or prompts, not both"),
    "long prompt": (["--prompt", "x " * 200], "tokens', allowed 1 to 95 tokens, so that a new one fits"),
    "not Unicode": (["--prompt", os.fsdecode(b"a\xff")], "allowed Unicode text"),
    "exit 0": (["--exit_layer", "0"], "exit_layer: got 0, allowed [1, 3]; 4 is the full model: use strategy auto"),
    "exit L": (["--exit_layer", "4"], "exit_layer: got 4, allowed [1, 3]; 4 is the full model: use strategy auto"),
    "exit -1": (["--exit_layer", "-1"], "exit_layer: got -1, allowed [1, 3]"),
    "exit 99": (["--exit_layer", "99"], "exit_layer: got 99, allowed [1, 3]"),
    "lossy exit 99": (["--strategy", "early_exit", "--exit_layer", "99"], "exit_layer: got 99, allowed [1, 4]"),
    "drafts": (["--num_draft_tokens", "0"], "num_draft_tokens: got 0, allowed [1, inf)"),
    "bits of float32": (["--quantization", "int4"], "quantization: got 'int4 in float32', allowed none, or dtype bf"),
    "bits of none": (["--quantization", "int2"], "quantization: got int2, allowed none | int8 | int4"),
    "threads": (["--threads", "100000"], "threads: got 100000, allowed [1, "),
    "budget": (["--max_new_tokens", "-1"], "max_new_tokens: got -1, allowed [0, inf)"),
    "temperature": (["--temperature", "-1"], "temperature: got -1.0, allowed [0.0, inf)"),
    "top_k": (["--top_k", "0", "--temperature", "1"], "top_k: got 0, allowed [1, inf)"),
    "top_p": (["--top_p", "0", "--temperature", "1"], "top_p: got 0.0, allowed (0, 1]"),
    "min_p": (["--min_p", "2", "--temperature", "1"], "min_p: got 2.0, allowed [0.0, 1.0]"),
    "penalty": (["--repetition_penalty", "0"], "repetition_penalty: got 0.0, allowed (0, inf); 1 is off"),
    "strategy": (["--strategy", "magic"], "strategy: got magic, allowed autoregressive | early_exit | self_spec"),
    "no number": (["--exit_layer", "abc"], "exit_layer: got abc, allowed int"),
    "not finite": (["--temperature", "nan"], "temperature: got nan, allowed float (a finite number)"),
    "not finite in YAML": (["--top_p", ".nan"], "top_p: got nan, allowed (0, 1]"),
    "no seed": (["--seed", "x"], "seed: got x, allowed int (a whole number)"),
    "nothing": (["--exit_layer="], "exit_layer: got '', allowed int"),
    "no switch": (["--fall_back", "maybe"], "fall_back: got maybe, allowed true | false"),
    "true strategy": (["--strategy", "true"], "strategy: got true, allowed autoregressive | early_exit | self_spec"),
    "no brackets": (["--skipped_layers", "3,4"], "got 3,4, allowed list[int]; write [3,4], in quotes if there are"),
    "several": (["--skipped_layers", "3", "4"], "got 3, allowed list[int]; write [3], in quotes if there are spaces"),
    "spaces": (["--skipped_layers", "[3,", "4]"], "skipped_layers: got [3,, allowed list[int]; write [3], in quotes"),
    "no value": (["--top_k", "--chat", "true"], "top_k: expected one argument"),
    "a value too many": (["--json=yes"], "json: ignored explicit argument 'yes'"),
    "a stray word": (["hello"], "unrecognized arguments: hello"),
    "no config": (
        ["--config", "/nope.yaml"],
        "config: got '/nope.yaml', allowed a YAML file (no such file or directory)",
    ),
    "no list": (["--skipped_layers", "a"], "skipped_layers: got a, allowed list[int]"),
    "no numbers": (["--skipped_layers", "[1, a]"], "skipped_layers: got a, allowed int"),
    "policy": (["--draft_policy", "some"], "draft_policy: got some, allowed fixed | adaptive | dynamic | off"),
    "n-grams off": (["--strategy", "n_gram", "--n_gram_match", "0"], "n_gram_match: got 0, allowed at least 1, with"),
    "n-grams below off": (["--n_gram_match", "-1"], "n_gram_match: got -1, allowed [0, inf); 0 is off"),
    "empty n-gram drafts": (["--n_gram_max_drafts", "0"], "n_gram_max_drafts: got 0, allowed [1, inf)"),
    "no blocks": (["--strategy", "layer_skip"], "skipped_layers: got None, allowed a value, with strategy layer_skip"),
    "all blocks": (
        ["--strategy", "layer_skip", "--skipped_layers", "[0,1,2,3]"],
        "allowed between 1 and 3 block indices, each 0..3",
    ),
    "no draft model": (["--strategy", "draft_model"], "draft_model: got None, allowed a model, with strategy draft_m"),
    "draft model": (["--strategy", "draft_model", "--draft_model", "/no/such"], "draft_model: got '/no/such'"),
    "seed": (["--seed", "-1"], "seed: got -1, allowed [0,"),
    "batch_size": (["--batch_size", "0"], "batch_size: got 0, allowed [1, inf)"),
    "stop": (["--stop", "a", ""], "stop: got '', allowed valid text of at least one character"),
    "chat": (["--chat", "true"], "chat: got True, allowed false; this tokenizer has no chat template"),
    "model": (["--model", "/no/such/model"], "model: got '/no/such/model'"),
    "prompts": (["--prompts", "/no/such.jsonl"], "prompts: /no/such.jsonl cannot be read"),
    "device": (["--device", "tpu"], "device: got tpu, allowed auto | cpu | cuda"),
    "unknown": (["--num_drafts=2"], "num_drafts: unknown key; nearest: num_draft_tokens"),
    "a dash": (["--exit-layer", "2"], "exit-layer: unknown key; nearest: exit_layer"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_with_status_2_and_one_message(generate, tmp_path, case):
    arguments, message = MISTAKES[case]
    needs_no_prompt = case in ("neither", "prompts") or "--prompt" in arguments
    file = write_prompts(tmp_path / "FILE", ["a"])
    arguments = [str(file) if argument == "FILE" else argument for argument in arguments]
    shown = generate(*arguments, prompt=None if needs_no_prompt else PROMPT, status=2)
    assert message in shown.err
    assert shown.err.count("error: ") == 1
    assert len(shown.err[shown.err.index("error: ") :].splitlines()) <= 2
    assert "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"temperatur: 1", "temperatur: unknown key; nearest: temperature"),
        (b"temperature: x", "temperature: got x, allowed float"),
        (b"skipped_layers: 3,4", "skipped_layers: got 3,4, allowed list[int]; write [3,4]"),
        (b"stop: a", "stop: got one text, allowed a list of texts; write [text]"),
        (b"a: [1", "config: not YAML (while parsing a flow sequence"),
        (b"a\xff: 1", "config: not YAML ('utf-8' codec can't decode byte 0xff"),
        (b"- 1", "config: got '- 1', allowed YAML of the form 'option: value'"),
        (b"", "config: got '', allowed YAML of the form 'option: value'"),
    ],
)
def test_a_mistake_in_a_config_ends_with_status_2_and_one_message(generate, tmp_path, content, message):
    file = tmp_path / "options.yaml"
    file.write_bytes(content)
    err = generate("--config", str(file), status=2).err
    assert err.startswith(f"error: {message}")
    assert err.endswith("\n(options: layerskip generate --help)\n")
    assert len(err.splitlines()) == 2


def test_a_bad_line_of_a_prompts_file_is_named_by_its_number(generate, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\nnonsense\n')
    assert "prompts.jsonl, line 2: not JSON" in generate("--prompts", file, prompt=None, status=2).err
    write_prompts(file, ["a", "b " * 200])
    assert "prompts.jsonl: prompt 2: got '" in generate("--prompts", file, prompt=None, status=2).err


def test_a_model_that_cannot_be_decoded_with_is_refused_by_name(generate, draft_model, tmp_path):
    misfit = save_model(tmp_path / "misfit", vocab_size=100)
    assert "a model with a tokenizer of ids below its vocab_size (100)" in generate(model=misfit, status=2).err
    empty = save_model(tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    assert "allowed a directory with safetensors weights" in generate(model=empty, status=2).err
    other_tokens = train_byte_level_bpe(["another text altogether " * 9], vocab_size=290)
    stranger = save_model(tmp_path / "stranger", tokenizer=other_tokens)
    broken = save_model(tmp_path / "broken", chat_template="{{ 1 / 0 }}")
    told = "chat: got True, allowed a template that takes these messages; division by zero"
    assert told in generate("--chat", "true", model=broken, status=2).err
    arguments = ["--strategy", "draft_model", "--draft_model", stranger]
    assert "allowed a model with the target's tokenizer" in generate(*arguments, status=2).err


def test_a_reader_that_has_gone_ends_it_silently(generate, tmp_path, monkeypatch):
    file = write_prompts(tmp_path / "prompts.jsonl", ["the", "end"])
    for arguments in (["--prompts", file, "--json"], ["--prompts", file], ["--prompt", "the"]):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as stdout:
            monkeypatch.setattr("sys.stdout", stdout)
            shown = generate(*arguments, "--max_new_tokens", 5, "--strategy", "autoregressive", prompt=None, status=141)
        assert shown.err == ""


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_with_status_2_and_advice_that_fits(generate, monkeypatch):
    monkeypatch.setattr("sys.stdout", FullDisk())
    err = generate("--strategy", "autoregressive", status=2).err
    assert "No space left on device; files written before are whole: make room and repeat" in err


def interrupt_after(monkeypatch, steps):
    """Ctrl-C while the `steps`-th round of the request is told of."""
    left, finish = [steps], Decoding.finish

    def interrupted(decoding, on_step):
        def count(index, step):
            if on_step is not None:
                on_step(index, step)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        return finish(decoding, count)

    monkeypatch.setattr(Decoding, "finish", interrupted)


def test_an_interrupted_file_keeps_what_was_decoded(generate_json, generate, tmp_path, monkeypatch):
    file = write_prompts(tmp_path / "prompts.jsonl", ["the", "end", "more"])
    arguments = ["--prompts", file, "--batch_size", 2, "--strategy", "autoregressive", "--max_new_tokens", 5]
    whole = generate_json(*arguments, prompt=None)
    interrupt_after(monkeypatch, 6)  # two rows, in the third round
    parts = generate_json(*arguments, prompt=None, status=130)
    assert [part["stop_reason"] for part in parts] == ["interrupted", "interrupted"]
    assert [part["num_tokens"] for part in parts] == [3, 3]
    assert all(part["tokens"] == result["tokens"][:3] for part, result in zip(parts, whole, strict=False))
    interrupt_after(monkeypatch, 13)  # the second batch has one row
    shown = generate(*arguments, prompt=None, status=130)
    assert [line[:5] for line in shown.out.splitlines() if line.startswith("[")] == ["[1/3]", "[2/3]", "[3/3]"]
    assert "3 prompts, 13 tokens, 2 stopped by max_new_tokens, 1 interrupted" in shown.err


def test_ctrl_c_before_decoding_ends_with_status_130_too(generate, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("app.generation.loaded_model.load_decoder", interrupted)
    assert generate(status=130).err == "interrupted\n"


def generate_to(descriptor, told, model):
    """Decode a model's endless text to a pipe, and statistics to a file, in a process that Ctrl-C reaches."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent may ignore the signal
    options = ["--max_new_tokens", "150000", "--temperature", "1"]
    sys.argv = ["layerskip", "generate", "--model", str(model), "--prompt", PROMPT, *options]
    with os.fdopen(descriptor, "w") as sys.stdout, told.open("w") as sys.stderr:
        sys.exit(main())


def test_ctrl_c_mid_stream_keeps_the_text_and_prints_statistics(tmp_path):
    endless = save_model(tmp_path / "model", max_length=200_000)
    told, (reading, writing) = tmp_path / "stderr", os.pipe()
    child = get_context("fork").Process(target=generate_to, args=(writing, told, endless))
    child.start()
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        try:
            first = stream.read(20)  # it is decoding
            os.kill(child.pid, signal.SIGINT)
            out = stream.read()
            child.join(timeout=60)
        finally:
            child.kill()
    err = told.read_text()
    assert len(first) == 20
    assert out.endswith(b"\n")
    assert child.exitcode == 130, err
    assert "tokens, interrupted, " in err
    assert "tokens a round" in err
    assert "Traceback" not in err
