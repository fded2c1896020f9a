"""Loading takes the weights' memory once, in every form, and initialises nothing that is overwritten."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from app.model_files.open import load_for_decoding, load_pretrained
from tests.support.checkpoints import write_checkpoint, write_shards
from tests.support.memory import Peak
from tests.support.processes import run_ranks
from tests.support.tiny_models import tiny_config, tiny_llama
from tests.support.tokenizers import byte_level

FORMS = ("sharded", "run.ckpt", "shards")


def make_model() -> LlamaForCausalLM:
    config = tiny_config(vocab_size=12_000, hidden_size=768, num_layers=6, tied=False, num_attention_heads=12)
    return LlamaForCausalLM(config)


def size(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, model, tokenizer = tmp_path_factory.mktemp("large"), make_model(), byte_level()
    model.save_pretrained(root / "sharded", max_shard_size="50MB")
    tokenizer.save_pretrained(root / "sharded")
    file = write_checkpoint(root / "run.ckpt", model, tokenizer, optimizer_states=[model.state_dict()])
    write_shards(root / "shards", file, model)
    tiny_llama(vocab_size=300).save_pretrained(root / "tiny")
    load_pretrained(str(root / "tiny"))  # what is imported on the way does not count
    return root


def _growth(load: Callable[..., Any], path: str, dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes by which this process was at most larger than at its start, and bytes of the weights."""
    load_pretrained(str(Path(path).parent / "tiny"))  # a fork maps its libraries as it comes to them
    with Peak() as peak:
        loaded = load(path, dtype=dtype)
    weights = size(loaded[0] if isinstance(loaded, tuple) else loaded)
    return peak.grown, weights


def ratio(load: Callable[..., Any], path: Path, dtype: torch.dtype | None = None) -> float:
    ((grown, weights),) = run_ranks(_growth, load, str(path), dtype, world_size=1)
    return float(grown / weights)


linux = pytest.mark.skipif(sys.platform != "linux", reason="no other system tells what a process took at most")


@linux
@pytest.mark.parametrize("form", FORMS)
def test_loading_takes_the_memory_of_the_weights_once(saved: Path, form: str) -> None:
    assert 0.9 < ratio(load_pretrained, saved / form) < 1.2
    assert ratio(load_for_decoding, saved / form) < (1.2 if form == "shards" else 0.3)  # the others are maps


@linux
def test_converting_takes_the_memory_of_the_converted_weights_once(saved: Path) -> None:
    assert 0.9 < ratio(load_pretrained, saved / "run.ckpt", torch.bfloat16) < 1.2
    assert 0.9 < ratio(load_for_decoding, saved / "sharded", torch.bfloat16) < 1.2


class Initialisations(TorchDispatchMode):
    """Counts what draws or fills memory; the meta device has none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        drawn = name in ("normal_", "uniform_", "trunc_normal_", "fill_", "zero_", "randn", "rand", "zeros", "ones")
        self.count += drawn and isinstance(out, torch.Tensor) and out.device.type != "meta"
        return out


@pytest.mark.parametrize("form", ["single", "run.ckpt"])
def test_nothing_is_initialised_only_to_be_overwritten(form: str, tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=300)
    if form == "single":
        model.save_pretrained(tmp_path / form)
    else:
        write_checkpoint(tmp_path / form, model, byte_level())
    with Initialisations() as loading:
        loaded = load_pretrained(str(tmp_path / form))
    with Initialisations() as building:
        LlamaForCausalLM(model.config)
    assert loading.count == 0 < building.count
    assert torch.equal(
        loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq
    )  # computed, for no file has it
