"""Memory of checkpoint files is given back once it was copied, and nothing else ever changes."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedModel

from app.model import mapped_memory
from app.model.functional_block import join_projections
from app.model.mapped_memory import file_mappings, page_out
from tests.support.memory import process_status
from tests.support.tiny_models import tiny_llama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no other system tells what is mapped")
_EVERYTHING = [range(2**63)]


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """The addresses that the kernel is advised of, from now on."""
    addresses: list[range] = []
    monkeypatch.setattr(
        mapped_memory, "_advise", lambda start, length, _: addresses.append(range(start, start + length))
    )
    return addresses


def _loaded(folder: Path) -> PreTrainedModel:
    tiny_llama(hidden_size=128, num_layers=2).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def _projections(model: PreTrainedModel) -> list[torch.Tensor]:
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    return [weight for name, weight in model.named_parameters() if name.split(".")[-2] in names]


def _mapped_from(folder: Path) -> list[range]:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    return [range(*(int(address, 16) for address in line[0].split("-"))) for line in lines]


def test_all_pages_of_joined_weights_are_given_back_and_no_other(tmp_path: Path, advised: list[range]) -> None:
    model = _loaded(tmp_path)
    before = [range(weight.data_ptr(), weight.data_ptr() + weight.nbytes) for weight in _projections(model)]
    mappings = _mapped_from(tmp_path)
    join_projections(model)
    for pages in advised:
        assert pages.start % mmap.PAGESIZE == len(pages) % mmap.PAGESIZE == 0
        assert any(pages.start in weight and pages.stop <= weight.stop for weight in before)
        assert any(pages.start in mapping and pages.stop <= mapping.stop for mapping in mappings)
    assert sum(map(len, advised)) > sum(len(weight) - 2 * mmap.PAGESIZE for weight in before) > 0
    assert not any(weight.data_ptr() in mapping for weight in _projections(model) for mapping in mappings)


def test_weights_that_lie_in_no_file_are_left_alone(tmp_path: Path, advised: list[range]) -> None:
    join_projections(tiny_llama(hidden_size=128))
    converted = _loaded(tmp_path).double()
    join_projections(converted)
    assert not advised


def test_logits_are_those_of_before(tmp_path: Path) -> None:
    model, tokens = _loaded(tmp_path).eval(), torch.arange(9)[None]
    with torch.no_grad():
        before = model(tokens).logits
        join_projections(model)
        torch.testing.assert_close(model(tokens).logits, before)


def test_what_was_written_to_a_mapped_weight_survives(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(64, 4096)}, tmp_path / "x.safetensors")
    weight = load_file(tmp_path / "x.safetensors")["weight"]
    weight[::2] = 7.0
    assert any(weight.data_ptr() in mapping for mapping in file_mappings())
    page_out(weight, file_mappings())
    assert weight[::2].eq(7.0).all()
    assert weight[1::2].eq(0.0).all()


@pytest.mark.parametrize("last_use", [False, True])
def test_pages_that_another_process_maps_go_at_their_last_use(tmp_path: Path, last_use: bool) -> None:
    """Ranks of one node copy the same tensors at the same time."""
    save_file({"weight": torch.ones(2_048, 4_096)}, tmp_path / "x.safetensors")
    weight = load_file(tmp_path / "x.safetensors")["weight"]
    code = f"from safetensors.torch import load_file\nw = load_file({str(tmp_path / 'x.safetensors')!r})['weight']\n"
    code += "print(w.sum().item(), flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert float(other.stdout.readline()) == weight.sum().item()
        held = process_status("VmRSS")
        page_out(weight, file_mappings(), last_use=last_use)
        assert (process_status("VmRSS") < held - 0.9 * weight.nbytes / 1024) == last_use
        other.communicate("\n")
    assert weight.eq(1.0).all()


def test_even_mistaken_advice_loses_nothing_of_memory_that_lies_in_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.arange(2**18, dtype=torch.float32)
    assert not any(weight.data_ptr() in mapping for mapping in file_mappings())
    page_out(weight, _EVERYTHING)
    assert torch.equal(weight, torch.arange(2**18, dtype=torch.float32))
    monkeypatch.setattr(mapped_memory, "_MADV_PAGEOUT", 4)  # MADV_DONTNEED, which would lose it
    page_out(weight, _EVERYTHING)
    assert not torch.equal(weight, torch.arange(2**18, dtype=torch.float32))
