"""What `write_pretrained` writes is what `save_pretrained` would write, from a checkpoint read tensor by tensor."""

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

import app.export.directory as module
from app.checkpoints.weights import STATE_DICT_PREFIX, open_trained_weights
from app.errors import CheckpointError, ConfigError
from app.export.directory import ExportSettings, architecture, write_pretrained
from app.export.output_directory import check_output_dir
from tests.support.checkpoints import write_checkpoint
from tests.support.memory import Peak

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, untied, scaled rope": LlamaConfig(**SHAPE, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
}


def test_weights_beyond_the_range_of_the_type_asked_for_are_refused_and_nothing_is_written(tmp_path):
    model = new_model(CONFIGS["llama, tied"])
    model.model.norm.weight.data[0] = 1e6
    with pytest.raises(
        CheckpointError, match=r"LlamaForCausalLM: model\.norm\.weight holds NaN or infinity in float16"
    ):
        write_pretrained(model, None, tmp_path / "out", settings=ExportSettings(dtype=torch.float16))
    assert [*tmp_path.iterdir()] == []


def new_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def checkpoint_of(model, path: Path, **weights):
    """As LayerSkipModule's: a tied head is in it twice."""
    state = {STATE_DICT_PREFIX + name: tensor for name, tensor in (model.state_dict() | weights).items()}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    return Path(write_checkpoint(path, model, None, state_dict=state))


def export(checkpoint: Path, directory: Path, **settings):
    weights = open_trained_weights(checkpoint)
    model = architecture(weights.config)
    return write_pretrained(
        model, weights.tokenizer, directory, weights=weights, settings=ExportSettings(readme="# it\n", **settings)
    )


def in_a_child(function: Callable[[], Any]) -> Any:
    """What the function returns in a process of its own."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=lambda: results.put(function()))
    child.start()
    try:
        return results.get(timeout=60)
    finally:
        child.join(timeout=5)
        child.kill()


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "README.md"}


@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_file_is_byte_for_byte_what_save_pretrained_writes(name, max_shard_size, tmp_path):
    model = new_model(CONFIGS[name])
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    checkpoint = checkpoint_of(model, tmp_path / "run.ckpt")
    num_files = export(checkpoint, tmp_path / "ours", max_shard_size=max_shard_size)
    theirs, ours = contents(tmp_path / "theirs"), contents(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    assert [file for file in ours if ours[file] != theirs[file]] == []
    assert num_files == sum(file.endswith(".safetensors") for file in ours)
    assert (num_files > 1) == (max_shard_size == "30KB") == ("model.safetensors.index.json" in ours)
    assert sum(b"lm_head" in content for content in ours.values()) == (
        0 if model.config.tie_word_embeddings else 1 + (num_files > 1)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_save_pretrained_after_a_conversion(dtype, tmp_path):
    model = new_model(CONFIGS["qwen3"])
    export(checkpoint_of(model, tmp_path / "run.ckpt"), tmp_path / "ours", dtype=dtype)
    model.to(dtype).save_pretrained(tmp_path / "theirs")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    export(checkpoint_of(model, tmp_path / "run.ckpt"), tmp_path / "kept")
    assert contents(tmp_path / "kept") == contents(tmp_path / "theirs")


def test_every_file_can_be_read_by_whom_the_others_can(tmp_path):
    export(checkpoint_of(new_model(CONFIGS["qwen3"]), tmp_path / "run.ckpt"), tmp_path / "out")
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1


EXTRA = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"model.norm.weight": None}, r"run\.ckpt: model\.norm\.weight of a LlamaForCausalLM is missing"),
        ({"model.norm.weight": EXTRA}, r"model\.norm\.weight has shape \[2, 2\], config\.json says \[32\]"),
        ({"model.adapter.weight": EXTRA}, r"1 weights are not of a LlamaForCausalLM, the first is model\.adapter"),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_is_written(weights, message, tmp_path):
    checkpoint = checkpoint_of(new_model(CONFIGS["llama, tied"]), tmp_path / "run.ckpt", **weights)
    with pytest.raises(CheckpointError, match=message):
        export(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run.ckpt"]


@pytest.mark.parametrize("size", ["", "5", "5G", "GB", "five GB", "-1GB", "0GB"])
def test_a_size_that_cannot_be_read_is_refused(size):
    with pytest.raises(ConfigError, match="max_shard_size: got"):
        ExportSettings(max_shard_size=size)


# -- what it says of generation ----------------------------------------------------------------------------------------


def generating(**fields):
    model = new_model(CONFIGS["qwen3"])
    model.generation_config = GenerationConfig(**fields)
    return model


IDLE = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "length_penalty": 2.0, "pad_token_id": -1}


def test_fields_without_effect_with_which_transformers_saves_nothing_are_dropped_and_named(tmp_path, caplog):
    model = generating(**IDLE, max_new_tokens=7)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.generation_config.save_pretrained(tmp_path)
    write_pretrained(model, None, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written.keys().isdisjoint(IDLE.keys() - {"do_sample"})
    assert written["max_new_tokens"] == 7
    assert model.generation_config.temperature == 0.6
    (record,) = [record for record in caplog.records if record.name.startswith("app.")]
    for said in ("temperature 0.6", "top_p 0.9", "length_penalty 2.0", "pad_token_id -1"):
        assert said in record.message


@pytest.mark.parametrize("fields", [{}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"num_beams": 2}])
def test_what_transformers_saves_stays(fields, tmp_path, caplog):
    model = generating(**fields)
    model.generation_config.save_pretrained(tmp_path)
    write_pretrained(model, None, tmp_path / "out")
    assert (tmp_path / "out/generation_config.json").read_text() == (tmp_path / "generation_config.json").read_text()
    assert not caplog.records


def test_a_generation_config_that_contradicts_itself_is_refused_in_one_line_before_weights_are_written(
    tmp_path, monkeypatch
):
    model = generating()
    model.generation_config.max_new_tokens = 0
    monkeypatch.setattr(module, "save_file", None)
    with pytest.raises(CheckpointError, match=r"config\.json contradicts itself, .* greater than 0") as caught:
        write_pretrained(model, None, tmp_path / "out")
    assert "\n" not in str(caught.value)


# -- whole or absent ---------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    return checkpoint_of(new_model(CONFIGS["llama, untied, scaled rope"]), tmp_path / "run.ckpt")


def export_and_die(checkpoint: Path, directory: Path, *, at_file: int) -> None:
    """In a process of its own, killed when the n-th file of weights is half written."""
    child = os.fork()
    if child == 0:
        save, count = module.save_file, 0

        def half(tensors, filename, metadata):
            nonlocal count
            count += 1
            if count == at_file:
                filename.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            save(tensors, filename, metadata)

        module.save_file = half
        try:
            export(checkpoint, directory, max_shard_size="30KB")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_in_the_middle_nothing_has_the_name_and_the_next_export_works(checkpoint, tmp_path):
    out = tmp_path / "out"
    export_and_die(checkpoint, out, at_file=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "run.ckpt"]
    assert check_output_dir(str(out)) == out
    export(checkpoint, out, max_shard_size="5GB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run.ckpt"]
    assert sorted(contents(out)) == ["config.json", "generation_config.json", "model.safetensors"]


def test_killed_in_the_middle_an_earlier_export_stays_whole(checkpoint, tmp_path):
    out = tmp_path / "out"
    export(checkpoint, out)
    before = contents(out)
    export_and_die(checkpoint, out, at_file=1)
    assert contents(out) == before


def test_killed_between_taking_the_old_away_and_putting_the_new_in_the_old_comes_back(checkpoint, tmp_path):
    out = tmp_path / "out"
    export(checkpoint, out)
    before = contents(out)
    out.rename(tmp_path / ".out.previous")  # what such a kill leaves
    assert check_output_dir(str(out)) == out
    assert contents(out) == before
    assert not (tmp_path / ".out.previous").exists()


@pytest.mark.parametrize("limit", [20_000, 500], ids=["in the weights", "in config.json"])
def test_where_the_disk_takes_no_more_nothing_is_left(checkpoint, tmp_path, limit):
    def fail() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError) as caught:
            export(checkpoint, tmp_path / "out")
        return str(caught.value)

    assert in_a_child(fail).startswith(f"cannot write {tmp_path / 'out'}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["run.ckpt"]


# -- what may be replaced ----------------------------------------------------------------------------------------------


def test_an_export_may_be_replaced_also_when_it_was_tuned(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "out", max_shard_size="30KB")
    (tmp_path / "out" / "generation_config.json").write_text("{}")  # as layerskip tune does
    assert check_output_dir(str(tmp_path / "out")) == tmp_path / "out"
    export(checkpoint, tmp_path / "out", dtype=torch.bfloat16)
    assert sorted(contents(tmp_path / "out")) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("notes.txt", "mine", r"notes\.txt came into it since"),
        ("README.md", "# Mine\n", "it holds something else"),
        (
            "README.md",
            lambda text: text.replace("# it", "# It"),
            r"its README\.md was edited",
        ),
    ],
)
def test_what_a_person_added_or_edited_is_only_replaced_when_told_so(checkpoint, tmp_path, file, content, reason):
    out = tmp_path / "out"
    export(checkpoint, out)
    text = content if isinstance(content, str) else content((out / file).read_text())
    (out / file).write_text(text)
    with pytest.raises(ConfigError, match=f"{reason}: choose another, or replace all of it with --overwrite true"):
        check_output_dir(str(out))
    assert check_output_dir(str(out), overwrite=True) == out
    (out / ".git").mkdir()
    with pytest.raises(ConfigError, match="choose another, or remove this one first"):
        check_output_dir(str(out), overwrite=True)


def test_what_is_no_model_directory_is_never_replaced(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    for path in ("full", "full/kept"):
        with pytest.raises(ConfigError, match="remove this one first"):
            check_output_dir(str(tmp_path / path), overwrite=True)


# -- memory ------------------------------------------------------------------------------------------------------------

MEGABYTE = 2**20


def added_megabytes(checkpoint: Path, directory: Path, **settings) -> int:
    """Peak memory of a process that exports, above what it had before."""

    def measure() -> int:
        with Peak() as peak:
            export(checkpoint, directory, **settings)
        return peak.grown // MEGABYTE

    return in_a_child(measure)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """120 MiB in 12 blocks of 10 MiB."""
    shape = SHAPE | {"hidden_size": 512, "head_dim": 128, "intermediate_size": 1196, "num_hidden_layers": 12}
    path = checkpoint_of(new_model(LlamaConfig(**shape)), tmp_path_factory.mktemp("large") / "run.ckpt")
    assert 115 * MEGABYTE < path.stat().st_size < 135 * MEGABYTE
    return path


def test_exporting_takes_the_memory_of_about_one_file_of_weights(large, tmp_path):
    """Weights in another dtype are copies; in their own they are maps, which take none."""
    in_several = added_megabytes(large, tmp_path / "several", max_shard_size="10MB", dtype=torch.bfloat16)
    in_one = added_megabytes(large, tmp_path / "one", max_shard_size="5GB", dtype=torch.bfloat16)
    assert len([*(tmp_path / "several").glob("*.safetensors")]) >= 4
    assert in_several < 30 < 50 < in_one  # MiB, of 60
