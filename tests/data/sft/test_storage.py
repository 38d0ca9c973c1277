"""Samples on disk are what they were, megatron-core reads them too, and the predecessor's rows become samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_patch.data.sft.samples import Sample
from megatron_patch.data.sft.storage import (
    PredecessorStore,
    SampleStore,
    StoreInfo,
    is_sample_store,
    open_samples,
    write_samples,
)
from tests.data.sft.make import all_samples, sample_of

INFO = StoreInfo("digest", 100, "chatml", "digest", 8, "right", True)
PACKS = [
    [sample_of([5, 6, 7], [1, 2]), sample_of([90_000, 2], [1])],
    [sample_of([1, 2, 3, 4, 5, 6, 7, 8], [3])],
    [sample_of([4, 4], [1]), sample_of([9], []), sample_of([3, 3, 3], [2])],
]


def same(one: Sample, other: Sample) -> bool:
    return one.ids.tolist() == other.ids.tolist() and one.mask.tolist() == other.mask.tolist()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    prefix = str(tmp_path / "new" / "train")
    assert write_samples(prefix, PACKS, INFO) == 6
    store = open_samples(prefix)
    assert (store.num_packs, store.num_samples, store.seq_length, store.info) == (3, 6, 8, INFO)
    assert (store.lengths.tolist(), store.marks.tolist()) == ([3, 2, 8, 2, 1, 3], [0, 2, 3, 6])
    flat = [one for pack in PACKS for one in pack]
    assert all(map(same, all_samples(store), flat))
    for number, pack in enumerate(PACKS):
        assert all(map(same, store.pack(number), pack)) and len(store.pack(number)) == len(pack)
    assert (store.sample(0).ids.dtype, store.sample(0).mask.dtype) == (np.int32, bool)


def test_megatron_core_reads_both_parts(tmp_path: Path) -> None:
    prefix = str(tmp_path / "train")
    write_samples(prefix, PACKS, INFO)
    for part, field, dtype in (("ids", 0, np.int32), ("mask", 1, np.uint8)):
        dataset = IndexedDataset(f"{prefix}_{part}")
        assert dataset.index.dtype == dtype
        assert dataset.document_indices.tolist() == [0, 2, 3, 6]
        read = [dataset[i].tolist() for i in range(len(dataset))]
        assert read == [one[field].astype(int).tolist() for pack in PACKS for one in pack]


def test_the_files_are_those_that_megatron_core_would_write(tmp_path: Path) -> None:
    prefix = str(tmp_path / "train")
    write_samples(prefix, PACKS, INFO)
    builder = IndexedDatasetBuilder(str(tmp_path / "core.bin"), dtype=np.int32)
    for pack in PACKS:
        builder.add_document(np.concatenate([one.ids for one in pack]), [len(one.ids) for one in pack])
    builder.finalize(str(tmp_path / "core.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"train_ids.{suffix}").read_bytes() == (tmp_path / f"core.{suffix}").read_bytes()


def test_nothing_appears_if_writing_fails(tmp_path: Path) -> None:
    def packs():
        yield PACKS[0]
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_samples(str(tmp_path / "train"), packs(), INFO)
    assert list(tmp_path.iterdir()) == []


def test_an_older_store_stays_if_writing_its_successor_fails(tmp_path: Path) -> None:
    prefix = str(tmp_path / "train")
    write_samples(prefix, PACKS, INFO)
    with pytest.raises(ValueError, match="no sample to write"):
        write_samples(prefix, [], INFO)
    assert open_samples(prefix).num_samples == 6


def test_a_copy_of_a_sample_outlives_its_store(tmp_path: Path) -> None:
    write_samples(str(tmp_path / "train"), PACKS, INFO)
    kept = SampleStore(str(tmp_path / "train")).sample(0)
    for file in tmp_path.iterdir():
        file.unlink()
    assert same(kept, PACKS[0][0])


def test_parts_of_two_stores_are_not_taken_for_one(tmp_path: Path) -> None:
    prefix, other = str(tmp_path / "train"), str(tmp_path / "other")
    write_samples(prefix, PACKS, INFO)
    write_samples(other, PACKS[:2], INFO)
    (tmp_path / "other_mask.idx").rename(tmp_path / "train_mask.idx")
    with pytest.raises(ValueError, match="not that of the files beside it"):
        open_samples(prefix)


def test_a_store_that_is_cut_off_is_noticed(tmp_path: Path) -> None:
    write_samples(str(tmp_path / "train"), PACKS, INFO)
    data = (tmp_path / "train_mask.bin").read_bytes()
    (tmp_path / "train_mask.bin").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="the file ends in this document"):
        open_samples(str(tmp_path / "train"))


def test_what_is_no_store_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"kind": "other"}))
    assert not is_sample_store(str(tmp_path / "x"))
    with pytest.raises(ValueError, match="no tokenized samples here"):
        open_samples(str(tmp_path / "x"))


# --------------------------------------------------------------------------------------------------- the predecessor's


def predecessor_row(packed: list[tuple[list[int], int]], seq_length: int) -> list[int]:
    """A row as its script makes it, from (ids, length of the prompt) of each sample."""
    tokens: list[int] = []
    labels: list[int] = []
    for ids, prompt in packed:
        tokens += [*ids[:-1], -1 - ids[-1]]
        labels += [-100] * (prompt - 1) + ids[prompt:] + [-100]
    padding = seq_length - len(tokens)
    return [*tokens, *[0] * padding, *labels, *[-100] * padding]


def write_rows(prefix: Path, rows: list[list[int]], dtype: type = np.int32) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for row in rows:
        builder.add_document(np.array(row, dtype), [len(row)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


ROWS = [[([5, 6, 7, 8], 2), ([9, 1, 2], 1)], [([3, 0, 0, 4, 5, 6, 7, 9], 5)]]


def test_rows_of_tokens_and_labels_become_samples(tmp_path: Path) -> None:
    prefix = write_rows(tmp_path / "old_text_document", [predecessor_row(one, 8) for one in ROWS])
    assert is_sample_store(prefix)
    store = open_samples(prefix)
    assert isinstance(store, PredecessorStore)
    assert (store.seq_length, store.num_packs, store.num_samples, store.lengths.tolist()) == (8, 2, 3, [4, 3, 8])
    expected = [
        sample_of([5, 6, 7, 8], [2, 3]),
        sample_of([9, 1, 2], [1, 2]),
        sample_of([3, 0, 0, 4, 5, 6, 7, 9], [5, 6, 7]),
    ]
    assert all(map(same, all_samples(store), expected))
    assert [len(store.pack(number)) for number in range(2)] == [2, 1]


def test_a_mask_that_were_shifted_would_be_noticed(tmp_path: Path) -> None:
    """The labels of the layout are the tokens that follow: read as the tokens themselves, they make no sense."""
    row = predecessor_row(ROWS[0], 8)
    shifted = [*row[:8], *row[9:], -100]
    with pytest.raises(ValueError, match="labels that are not the tokens that follow"):
        open_samples(write_rows(tmp_path / "old", [shifted]))


def test_rows_with_nothing_in_them_and_samples_with_nothing_to_learn_are_left_out(tmp_path: Path) -> None:
    """The script writes both: an empty document at the end, and prompts cut off before the answer."""
    rows = [
        predecessor_row([([5, 6, 7], 3), ([1, 2], 1)], 8),
        predecessor_row([([4, 4], 2)], 8),
        predecessor_row(ROWS[1], 8),
        [],
    ]
    store = open_samples(write_rows(tmp_path / "old", rows))
    assert (store.num_packs, [one.ids.tolist() for one in all_samples(store)]) == (
        2,
        [[1, 2], [3, 0, 0, 4, 5, 6, 7, 9]],
    )


@pytest.mark.parametrize(
    ("rows", "dtype", "problem"),
    [
        ([[1, 2, 3, 4]], np.uint16, "token ids are uint16; rows of tokens and labels need int32"),
        ([[1, 2, 3, 4], [1, 2]], np.int32, "they must be of one length, 2 x seq_length"),
        ([[1, -3, -100, -100]], np.int32, "no row holds a sample with a label"),
        ([[1, 2, 2, -100]], np.int32, "row 0 has a label behind its last sample"),
    ],
)  # fmt: skip
def test_what_is_no_such_row_is_refused(rows: list[list[int]], dtype: type, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        open_samples(write_rows(tmp_path / "old", rows, dtype))


def test_pretraining_data_is_not_taken_for_it(tmp_path: Path) -> None:
    assert not is_sample_store(write_rows(tmp_path / "text", [[1, 2, 3, 4], [5, 6]]))
