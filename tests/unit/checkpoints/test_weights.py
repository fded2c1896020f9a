"""Checkpoints of ours read tensor by tensor, from one file and from shards, and nothing run that they may hold."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from app.checkpoints.shards import read_metadata
from app.checkpoints.weights import HF_CONFIG_KEY, TOKENIZER_KEY, is_trained_weights, open_trained_weights
from app.errors import CheckpointError
from app.model_files.open import load_config, load_for_decoding, load_pretrained
from tests.support.checkpoints import flip_bit, write_checkpoint, write_manifest, write_shards
from tests.support.tiny_models import tiny_llama
from tests.support.tokenizers import byte_level

MODEL = tiny_llama(vocab_size=len(byte_level()), tied=False)
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    file = write_checkpoint(root / "run.ckpt", MODEL, byte_level(), optimizer_states=[OPTIMIZER])
    write_shards(root / "shards", file, MODEL, optimizer_0=OPTIMIZER)
    return root


FORMS = pytest.mark.parametrize("form", ["run.ckpt", "shards"])


@FORMS
def test_every_weight_is_read_as_it_was_saved(saved: Path, form: str) -> None:
    weights = open_trained_weights(saved / form)
    expected = MODEL.state_dict()
    assert set(weights.shapes) == set(expected)
    for name, tensor in expected.items():
        assert weights.shapes[name] == (tensor.shape, tensor.dtype)
        assert torch.equal(weights.read(name), tensor)
    assert weights.config.to_dict() == MODEL.config.to_dict()
    assert weights.tokenizer.get_vocab() == byte_level().get_vocab()
    assert dict(weights.metadata) == {"global_step": 3}
    assert is_trained_weights(saved / form)


@FORMS
def test_the_model_is_loaded_for_training_and_for_decoding(saved: Path, form: str) -> None:
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = MODEL(tokens).logits
        for dtype in (None, torch.float32):
            assert torch.equal(load_pretrained(str(saved / form), dtype=dtype)(tokens).logits, expected)
            loaded, tokenizer = load_for_decoding(str(saved / form), dtype=dtype)
            assert torch.equal(loaded(tokens).logits, expected)
        assert load_pretrained(str(saved / form), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert tokenizer.get_vocab() == byte_level().get_vocab()
    assert load_config(str(saved / form)).hidden_size == MODEL.config.hidden_size


@FORMS
def test_weights_loaded_for_training_do_not_change_with_the_file(saved: Path, form: str, tmp_path: Path) -> None:
    path = tmp_path / form
    (shutil.copytree if form == "shards" else shutil.copy)(saved / form, path)
    trained, decoded = load_pretrained(str(path)), load_for_decoding(str(path), dtype=None)[0]
    for file in [path] if path.is_file() else path.glob("*.distcp"):
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))
    weight = MODEL.lm_head.weight
    assert torch.equal(trained.lm_head.weight, weight)
    assert torch.equal(decoded.lm_head.weight, weight) == (form == "shards")  # the other one is a map of its file


def _content(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        file = path / "meta.pt" if path.is_dir() else path
        content = torch.load(file, weights_only=True)
        change(content)
        torch.save(content, file)

    return rewrite


def _cut(name: str, share: float = 0.5) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        file = path / name
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return cut


def _forget_a_part(path: Path) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())  # noqa: S301  # written by this test
    metadata.state_dict_metadata["state_dict.model.lm_head.weight"].chunks.pop()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _look_elsewhere(path: Path) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())  # noqa: S301
    for place in metadata.storage_data.values():
        place.relative_path = f"../{path.name}/{place.relative_path}"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _scramble(path: Path) -> None:
    for file in path.glob("*.distcp"):
        file.write_bytes(os.urandom(file.stat().st_size))


def _other_pickle(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))


BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "file cut": ("run.ckpt", lambda path: _cut(path.name)(path.parent), "run.ckpt: truncated"),
    "no weights": ("run.ckpt", _content(lambda c: c.pop("state_dict")), "no 'state_dict' in it"),
    "foreign weights": (
        "run.ckpt",
        _content(lambda c: c.update(state_dict={"x": torch.ones(1)})),
        "all weights .*miss",
    ),
    "foreign": ("run.ckpt", _content(lambda c: c.pop(HF_CONFIG_KEY)), "not written by LayerSkipModule"),
    "config damaged": (
        "run.ckpt",
        _content(lambda c: c[HF_CONFIG_KEY].update(hidden_size="x")),
        "'hf_config' is damag",
    ),
    "no tokenizer": ("run.ckpt", _content(lambda c: c.pop(TOKENIZER_KEY)), "holds no tokenizer"),
    "tokenizer damaged": ("run.ckpt", _content(lambda c: c[TOKENIZER_KEY].clear()), "its tokenizer is damaged"),
    "shards: foreign": ("shards", _content(lambda c: c.pop(HF_CONFIG_KEY)), "not written by LayerSkipModule"),
    "shards: no metadata yet": ("shards", lambda path: (path / ".metadata").unlink(), r"not all there \(.metadata is"),
    "shards: no meta.pt yet": ("shards", lambda path: (path / "meta.pt").unlink(), r"not all there \(meta.pt is miss"),
    "shards: metadata cut": ("shards", _cut(".metadata"), ".metadata: damaged"),
    "shards: meta.pt cut": ("shards", _cut("meta.pt"), "meta.pt: truncated"),
    "shards: one missing": (
        "shards",
        lambda path: (path / "__1_0.distcp").unlink(),
        "__1_0.distcp is missing or trunc",
    ),
    "shards: one cut": ("shards", _cut("__1_0.distcp"), "__1_0.distcp is missing or truncated"),
    "shards: a part missing": ("shards", _forget_a_part, "parts of state_dict.model.lm_head.weight are missing"),
    "shards: elsewhere": ("shards", _look_elsewhere, "is in no file of this directory"),
    "shards: scrambled": ("shards", _scramble, "is damaged"),
    "shards: another pickle": ("shards", _other_pickle, "not the metadata of a distributed checkpoint"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_ends_in_one_error(saved: Path, tmp_path: Path, case: str) -> None:
    form, break_it, message = BROKEN[case]
    path = tmp_path / form
    (shutil.copytree if form == "shards" else shutil.copy)(saved / form, path)
    break_it(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_for_decoding(str(path), dtype=None)
    assert "\n" not in str(caught.value)


@FORMS
def test_one_flipped_bit_of_a_weight_is_noticed_before_the_model_is_used(
    saved: Path, form: str, tmp_path: Path
) -> None:
    path = tmp_path / form
    (shutil.copytree if form == "shards" else shutil.copy)(saved / form, path)
    if form == "shards":
        write_manifest(path)
    half = MODEL.lm_head.weight.detach().chunk(2)[1]  # what rank 1 wrote
    flip_bit(path / "__1_0.distcp" if form == "shards" else path, half.numpy().tobytes())
    open_trained_weights(path)  # reads no weights, whatever they are
    for load in (load_pretrained, lambda path: load_for_decoding(path, dtype=None)):
        with pytest.raises(CheckpointError, match=r"damaged, the bytes of .* are not those that were written"):
            load(str(path))


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("hidden_in", ["run.ckpt", "shards/meta.pt", "shards/.metadata"])
def test_code_in_a_checkpoint_is_not_run(saved: Path, tmp_path: Path, hidden_in: str) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    witness, file = tmp_path / "witness", tmp_path / "copy" / hidden_in
    if file.name == ".metadata":
        metadata = pickle.loads(file.read_bytes())  # noqa: S301
        metadata.planner_data = Attack(witness)
        file.write_bytes(pickle.dumps(metadata))
    else:
        torch.save(torch.load(file, weights_only=True) | {"callbacks": Attack(witness)}, file)
    for opening in (open_trained_weights, load_config, load_pretrained):
        with pytest.raises(CheckpointError, match=r"plain tensors and values|more than descriptions of weights"):
            opening(str(tmp_path / "copy" / hidden_in.split("/")[0]))
    assert not witness.exists()
    if file.name == ".metadata":  # an unguarded reader runs it
        pickle.loads(file.read_bytes())  # noqa: S301
    else:
        torch.load(file, weights_only=False)
    assert witness.exists()


@pytest.mark.parametrize(
    "reference",
    [
        "cos\nsystem\n",
        "cbuiltins\neval\n",
        "ctorch\nload\n",
        "ctorch.serialization\nload\n",
        "ctorch\nSize.__class__\n",
    ],
)
def test_names_outside_the_table_are_refused(tmp_path: Path, reference: str) -> None:
    for pickled in (reference.encode() + b".", b"\x80\x04\x8c" + _frames(reference)):
        (tmp_path / ".metadata").write_bytes(pickled)
        with pytest.raises(CheckpointError, match="does not describe weights"):
            read_metadata(tmp_path / ".metadata")


class _ByName:
    """Pickled as an attribute of `owner`, as the first releases of Python 3.11 pickle members of an Enum."""

    def __init__(self, owner: type, name: str) -> None:
        self._attribute = (owner, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self._attribute


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        (_ByName(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"), "not the metadata of a distributed checkpoint"),
        (_ByName(_MEM_FORMAT_ENCODING, "__class__"), "holds more than descriptions of weights"),
        (_ByName(torch.Size, "__class__"), "getattr does not describe weights"),
    ],
)
def test_of_attributes_a_memory_format_alone_is_read(tmp_path: Path, attribute: _ByName, message: str) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(attribute))
    with pytest.raises(CheckpointError, match=message):
        read_metadata(tmp_path / ".metadata")


def _frames(reference: str) -> bytes:
    """The same by STACK_GLOBAL, which splits dotted names."""
    module, name = reference[1:].split("\n")[:2]
    return bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
