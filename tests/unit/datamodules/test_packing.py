from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from app.layerskip.early_exit_loss import IGNORE_INDEX
from datamodules.packing import PackedRows, pack_documents
from tests.support.tiny_models import tiny_llama

EOS = 0


def pack(documents: list[list[int]], *, seq_len: int) -> PackedRows:
    arrays: list[npt.NDArray[np.int32]] = [np.array(document, dtype=np.int32) for document in documents]
    return pack_documents(arrays, seq_len=seq_len, eos_id=EOS)


def test_a_small_case_by_hand() -> None:
    rows = pack([[1, 2], [3, 4, 5, 6], [7]], seq_len=4)
    none = IGNORE_INDEX
    assert rows.input_ids.tolist() == [[1, 2, EOS, 3], [4, 5, 6, EOS], [7, EOS, EOS, EOS]]
    assert rows.labels.tolist() == [[2, EOS, none, 4], [5, 6, EOS, none], [EOS, none, none, none]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 0]]
    assert rows.offsets.tolist() == [0, 3, 8, 10]
    assert (rows.num_rows, rows.num_tokens, rows.num_documents) == (3, 10, 3)
    assert {array.dtype for array in (rows.input_ids, rows.labels, rows.position_ids)} == {np.dtype(np.int32)}


def test_no_documents_give_no_rows() -> None:
    rows = pack([], seq_len=4)
    assert rows.input_ids.shape == (0, 4)
    assert rows.num_tokens == 0


@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=20), max_size=12),
    st.integers(2, 9),
)
def test_rows_against_a_loop_over_documents(documents: list[list[int]], seq_len: int) -> None:
    rows = pack(documents, seq_len=seq_len)
    inputs, labels, positions = [], [], []
    for document in documents:
        for index, token in enumerate([*document, EOS]):
            at_row_start = len(inputs) % seq_len == 0
            positions.append(0 if index == 0 or at_row_start else positions[-1] + 1)
            inputs.append(token)
            labels.append([*document, EOS, IGNORE_INDEX][index + 1])
    padding = -len(inputs) % seq_len
    assert rows.input_ids.reshape(-1).tolist() == inputs + [EOS] * padding
    assert rows.labels.reshape(-1).tolist() == labels + [IGNORE_INDEX] * padding
    assert rows.position_ids.reshape(-1).tolist() == positions + [0] * padding
    assert [rows.document(index).tolist() for index in range(rows.num_documents)] == documents


@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=20), min_size=1, max_size=12),
    st.integers(2, 9),
)
def test_every_token_is_a_target_once_but_the_first_of_each_document(documents: list[list[int]], seq_len: int) -> None:
    labels = pack(documents, seq_len=seq_len).labels
    targets = [token for document in documents for token in [*document[1:], EOS]]
    assert labels[labels != IGNORE_INDEX].tolist() == targets


def logits(inputs: npt.NDArray[np.int32], positions: npt.NDArray[np.int32] | None) -> Tensor:
    """Logits [T, V] of a tiny Llama for one row [T]; without `positions`, the row is one document."""
    position_ids = None if positions is None else torch.from_numpy(positions).long()[None]
    with torch.no_grad():
        model = tiny_llama(init_scale=1.0)
        ids = torch.from_numpy(inputs).long()[None]
        return model(input_ids=ids, position_ids=position_ids, use_cache=False).logits[0]  # type: ignore[no-any-return]


def test_a_packed_row_gives_each_document_the_logits_it_has_alone() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 60, size=size).tolist() for size in (5, 9, 1, 30)]
    rows = pack(documents, seq_len=24)
    for row in range(rows.num_rows):
        inputs, positions = rows.input_ids[row], rows.position_ids[row]
        packed = logits(inputs, positions)
        starts = [*np.flatnonzero(positions == 0), len(inputs)]
        for start, stop in pairwise(starts):
            alone = logits(inputs[start:stop], None)
            torch.testing.assert_close(packed[start:stop], alone, rtol=0, atol=1e-6)
    # the negative control: one run of positions lets the documents see one another
    leaking = logits(rows.input_ids[0], np.arange(24, dtype=np.int32))
    assert (leaking - logits(rows.input_ids[0], rows.position_ids[0])).abs().max() > 1e-3
