"""The token ids that drafts are chosen from: which ones, and what files are refused."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import ConfigError, DataError
from app.generation.loaded_model import load_decoder
from app.model_files.decoding_defaults import DecodingDefaults, write_decoding_defaults
from app.model_files.draft_vocabulary import (
    DRAFT_VOCABULARY_FILE,
    draft_vocabulary_file,
    first_ids,
    ranked,
    read_draft_vocabulary,
    usual_size,
)
from tests.support.saved_models import save_model


def test_ends_come_first_then_the_most_frequent_ids_and_the_lower_of_equals() -> None:
    counts = Counter([5, 5, 7, 3, 7, 5, 9])
    assert ranked(counts, vocab_size=12, ends=(2,))[:6] == [2, 5, 7, 3, 9, 0]
    assert sorted(ranked(counts, vocab_size=12, ends=(2, 5))) == list(range(12))
    assert [usual_size(size, ends=(2, 5)) for size in (400, 12)] == [50, 2]
    assert usual_size(4, ends=()) == 1


def test_lists_of_ours_and_of_sglang_are_read(tmp_path: Path) -> None:
    ids = [5, 2, 1]
    (own := tmp_path / DRAFT_VOCABULARY_FILE).write_bytes(draft_vocabulary_file(ids))
    plain, tensor, listed = tmp_path / "ids.json", tmp_path / "tensor.pt", tmp_path / "list.pt"
    plain.write_text(json.dumps(ids))
    torch.save(torch.tensor(ids), tensor)
    torch.save(ids, listed)
    for file in (own, plain, tensor, listed):
        assert read_draft_vocabulary(file, vocab_size=6, ends=()) == ids
        assert read_draft_vocabulary(file, vocab_size=6, ends=(2,)) == [2, 5, 1], "each prefix has the ends"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[2, 6]", "id 6 is not below 6"),
        ("[2, -1]", "id -1 is not below 6"),
        ("[2, 1, 2]", "id 2 stands 2 times"),
        ("[1, 0]", "id 2, which ends a text, is not among its ids"),
        ("[]", "allowed a list of token ids"),
        ("[2, 1.0]", "allowed a list of token ids"),
        ("[2, true]", "allowed a list of token ids"),
        ('{"ids": [2]}', "'token_ids'"),
        ("7", "allowed a list of token ids"),
        ("[2", "no list of token ids can be read from it"),
    ],
)
def test_what_is_no_draft_vocabulary_of_the_model_is_refused(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "ids.json"
    file.write_text(content)
    with pytest.raises(DataError, match=r"ids\.json: ") as error:
        read_draft_vocabulary(file, vocab_size=6, ends=(2,))
    assert said in str(error.value)


def test_a_token_map_that_is_no_file_of_torch_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "map.pt"
    with pytest.raises(DataError, match="no list of token ids"):
        read_draft_vocabulary(file, vocab_size=6, ends=())
    file.write_bytes(b"no file of torch")
    with pytest.raises(DataError, match="no list of token ids"):
        read_draft_vocabulary(file, vocab_size=6, ends=())


def test_the_file_beside_a_model_is_used_unless_another_or_none_is_named(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")

    def draft_rows(name: str | None = None) -> float:
        decoder = load_decoder(str(model), dtype="auto", device="cpu", draft_vocabulary=name).decoder
        return decoder.draft_head_size / decoder.head_size * decoder.vocab_size

    whole = draft_rows()
    ends = load_decoder(str(model), dtype="auto", device="cpu").eos_token_ids
    (model / DRAFT_VOCABULARY_FILE).write_bytes(draft_vocabulary_file([*ends, 20, 21, 22]))
    (tmp_path / "other.json").write_text(json.dumps([*ends, 20]))
    counts = [draft_rows(), draft_rows(str(tmp_path / "other.json")), draft_rows("none")]
    assert counts == pytest.approx([len(ends) + 3, len(ends) + 1, whole])


def test_as_many_ids_are_used_as_were_stored_and_no_number_that_the_list_cannot_give(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    plain = load_decoder(str(model), dtype="auto", device="cpu")
    vocab_size, ends = plain.decoder.vocab_size, plain.eos_token_ids
    assert plain.decoder.draft_vocabulary is None
    (model / DRAFT_VOCABULARY_FILE).write_bytes(draft_vocabulary_file([20, 21, *ends, 22]))

    def used(stored: int | None, **options: Any) -> Sequence[int] | None:
        defaults = DecodingDefaults(
            strategy="self_speculative", exit_layer=1, num_draft_tokens=2, draft_vocabulary_size=stored
        )
        write_decoding_defaults(model, defaults)
        return load_decoder(str(model), dtype="auto", device="cpu", **options).decoder.draft_vocabulary

    listed = (*ends, 20, 21, 22)
    assert used(None) == listed
    assert used(vocab_size) is None
    assert used(len(ends) + 1) == (*ends, 20)
    assert used(len(ends) + 1, as_tuned=False) == listed
    assert used(len(ends) + 1, draft_vocabulary=str(model / DRAFT_VOCABULARY_FILE)) == listed
    assert used(len(ends) + 1, draft_vocabulary="none") is None
    for wrong in (len(listed) + 1, len(ends) - 1, vocab_size + 1):
        with pytest.raises(ConfigError, match=f"draft_vocabulary_size: got {wrong}, allowed"):
            used(wrong)
    with pytest.raises(ConfigError, match=r"draft_vocabulary_size: got 1, allowed \[2, 3\]"):
        first_ids([4, 5, 6], 1, ends=(4, 5))
