from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from app.layerskip.early_exit_loss import IGNORE_INDEX
from datamodules.streaming.packing import PACKINGS, PackedRow, Packing, Row, Tokens, best_fit_rows, split_rows
from tests.support.tiny_models import tiny_llama

EOS = 0

Documents = list[list[int]]
some_documents = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=20), min_size=1, max_size=40)


def arrays(documents: Documents) -> list[Tokens]:
    return [np.array([*document, EOS], dtype=np.int32) for document in documents]


def pack(documents: Documents, *, seq_len: int, packing: Packing = "split") -> list[Row]:
    return [packed.row for packed in PACKINGS[packing](iter(arrays(documents)), seq_len=seq_len)]


def parts(row: Row) -> list[tuple[list[int], list[int]]]:
    """Input ids and labels of each document in a row, without the padding."""
    starts = [*np.flatnonzero(row.position_ids[: row.num_tokens] == 0), row.num_tokens]
    return [(row.input_ids[a:b].tolist(), row.labels[a:b].tolist()) for a, b in pairwise(starts)]


def test_a_small_case_by_hand() -> None:
    rows = pack([[1, 2], [3, 4, 5, 6], [7]], seq_len=4)
    none = IGNORE_INDEX
    assert [row.input_ids.tolist() for row in rows] == [[1, 2, EOS, 3], [4, 5, 6, EOS], [7, EOS, 7, 7]]
    assert [row.labels.tolist() for row in rows] == [[2, EOS, none, 4], [5, 6, EOS, none], [EOS, none, none, none]]
    assert [row.position_ids.tolist() for row in rows] == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 0]]
    assert [row.num_tokens for row in rows] == [4, 4, 2]


def test_best_fit_by_hand() -> None:
    rows = pack([[1] * 2, [2] * 5, [3] * 9, [4]], seq_len=6, packing="best_fit")
    assert [[ids for ids, _ in parts(row)] for row in rows] == [
        [[1, 1, EOS]],
        [[2, 2, 2, 2, 2, EOS]],
        [[3, 3, 3, 3, 3, 3]],
        [[3, 3, 3, EOS], [4, EOS]],  # what a document leaves behind whole rows goes where it fits best
    ]


def test_best_fit_fills_the_first_row_to_its_end_and_orders_rows_by_their_first_documents() -> None:
    assert len(pack([[1] * 3, [2]], seq_len=6, packing="best_fit")) == 1
    rows = pack([[1] * 3, [2] * 4, [3]], seq_len=6, packing="best_fit")
    assert [[ids[0] for ids, _ in parts(row)] for row in rows] == [[1, 3], [2]]


def test_the_end_of_a_block_is_nothing_to_split_and_the_end_of_a_group_to_best_fit() -> None:
    first, second = arrays([[1], [2, 3]])
    split, best_fit = (list(pack(iter([first, None, None, second, None]), seq_len=6)) for pack in PACKINGS.values())
    assert [packed.row.input_ids[: packed.row.num_tokens].tolist() for packed in split] == [[1, EOS, 2, 3, EOS]]
    assert [packed.row.input_ids[: packed.row.num_tokens].tolist() for packed in best_fit] == [[1, EOS], [2, 3, EOS]]
    assert [(packed.finished, packed.within) for packed in best_fit] == [(1, 0), (2, 0)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_each_row_tells_where_the_next_begins(packing: Packing) -> None:
    documents = iter(arrays([[1] * 5, [2] * 11, [3] * 2]))
    positions = [(packed.finished, packed.within) for packed in PACKINGS[packing](documents, seq_len=6)]
    assert (
        positions
        == {
            "split": [(1, 0), (1, 6), (2, 0), (3, 0)],  # documents, and tokens of the next one
            "best_fit": [(0, 1), (0, 2), (0, 3), (3, 0)],  # documents of whole groups, and rows of the next one
        }[packing]
    )
    groups = PACKINGS["best_fit"](iter(arrays([[7] * 23] * 40)), seq_len=24)  # 32 rows of tokens are a group
    assert [packed.finished for packed in groups] == [0] * 31 + [32] + [32] * 7 + [40]


@given(some_documents, st.integers(2, 9))
def test_splitting_against_a_loop_over_documents(documents: Documents, seq_len: int) -> None:
    inputs, labels, positions = [], [], []
    for document in documents:
        for index, token in enumerate([*document, EOS]):
            at_row_start = len(inputs) % seq_len == 0
            positions.append(0 if index == 0 or at_row_start else positions[-1] + 1)
            inputs.append(token)
            labels.append([*document, EOS, IGNORE_INDEX][index + 1])
    rows = pack(documents, seq_len=seq_len)
    assert sum(row.num_tokens for row in rows) == len(inputs)
    assert np.concatenate([row.input_ids for row in rows])[: len(inputs)].tolist() == inputs
    assert np.concatenate([row.labels for row in rows]).tolist() == labels + [IGNORE_INDEX] * (-len(inputs) % seq_len)
    assert np.concatenate([row.position_ids for row in rows])[: len(inputs)].tolist() == positions
    assert all(row.num_tokens == seq_len for row in rows[:-1])


@pytest.mark.parametrize("packing", PACKINGS)
@given(documents=some_documents, seq_len=st.integers(2, 9))
def test_every_token_is_a_target_once_but_the_first_of_each_document(
    packing: Packing, documents: Documents, seq_len: int
) -> None:
    targets = [label for row in pack(documents, seq_len=seq_len, packing=packing) for label in row.labels.tolist()]
    expected = [token for document in documents for token in [*document[1:], EOS]]
    assert sorted(label for label in targets if label != IGNORE_INDEX) == sorted(expected)


@given(documents=some_documents, seq_len=st.integers(2, 25))
def test_best_fit_cuts_only_what_is_longer_than_a_row(documents: Documents, seq_len: int) -> None:
    rows = pack(documents, seq_len=seq_len, packing="best_fit")
    found = sorted(ids for row in rows for ids, _ in parts(row))
    whole = [[*document, EOS] for document in documents]
    assert found == sorted(ids[at : at + seq_len] for ids in whole for at in range(0, len(ids), seq_len))
    assert all(row.labels[row.num_tokens :].tolist() == [IGNORE_INDEX] * (seq_len - row.num_tokens) for row in rows)


def test_best_fit_wastes_little() -> None:
    rng = np.random.default_rng(0)
    documents = [[1] * int(size) for size in rng.integers(4, 90, size=600)]
    rows = pack(documents, seq_len=128, packing="best_fit")
    assert sum(row.num_tokens for row in rows) > 0.95 * 128 * len(rows)


@pytest.mark.parametrize("packing", PACKINGS)
@given(documents=some_documents, seq_len=st.integers(2, 9), data=st.data())
def test_rows_can_be_asked_for_from_the_middle(
    packing: Packing, documents: Documents, seq_len: int, data: st.DataObject
) -> None:
    whole = list(PACKINGS[packing](iter(arrays(documents)), seq_len=seq_len))
    stop: PackedRow = whole[(at := data.draw(st.integers(0, len(whole) - 1)))]
    rest = arrays(documents)[stop.finished :]
    again = [packed.row for packed in PACKINGS[packing](iter(rest), seq_len=seq_len, within=stop.within)]
    expected = [packed.row for packed in whole[at + 1 :]]
    assert [row.input_ids.tolist() for row in again if row.num_tokens] == [row.input_ids.tolist() for row in expected]
    assert [row.labels.tolist() for row in again] == [row.labels.tolist() for row in expected]


def logits(inputs: npt.NDArray[np.int32], positions: npt.NDArray[np.int32] | None) -> Tensor:
    """Logits [T, V] of a tiny Llama for one row [T]; without `positions`, the row is one document."""
    position_ids = None if positions is None else torch.from_numpy(positions).long()[None]
    with torch.no_grad():
        model = tiny_llama(init_scale=1.0)
        ids = torch.from_numpy(inputs).long()[None]
        return model(input_ids=ids, position_ids=position_ids, use_cache=False).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_row_gives_each_document_the_logits_it_has_alone(packing: Packing) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 60, size=size).tolist() for size in (5, 9, 1, 30)]
    rows = pack(documents, seq_len=24, packing=packing)
    for row in rows:
        packed = logits(row.input_ids, row.position_ids)
        starts = [*np.flatnonzero(row.position_ids == 0), len(row.input_ids)]
        for start, stop in pairwise(starts):
            alone = logits(row.input_ids[start:stop], None)
            torch.testing.assert_close(packed[start:stop], alone, rtol=0, atol=1e-6)
    # the negative control: one run of positions lets the documents see one another
    crowded = max(rows, key=lambda row: int((row.position_ids == 0).sum()))
    leaking = logits(crowded.input_ids, np.arange(24, dtype=np.int32))
    assert (leaking - logits(crowded.input_ids, crowded.position_ids)).abs().max() > 1e-3


def test_the_table_holds_both_packings() -> None:
    assert {"split": split_rows, "best_fit": best_fit_rows} == PACKINGS
