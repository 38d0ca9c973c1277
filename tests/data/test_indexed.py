"""The indexed writer against megatron-core's builder and reader."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_patch.data.indexed import indexed_writer, read_index, token_dtype

DOCUMENTS = [[1, 2, 3], [65000], list(range(200)), [7, 7]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_both_files_are_those_of_megatron_core_byte_for_byte(dtype, tmp_path, write_dataset):
    builder = IndexedDatasetBuilder(f"{tmp_path}/core.bin", dtype)
    for document in DOCUMENTS:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{tmp_path}/core.idx")
    prefix = write_dataset("ours", DOCUMENTS, dtype)
    for suffix in (".bin", ".idx"):
        assert Path(prefix + suffix).read_bytes() == Path(f"{tmp_path}/core{suffix}").read_bytes()


def test_documents_may_be_added_many_at_a_time(tmp_path, write_dataset):
    flat = np.concatenate([np.array(document, np.uint16) for document in DOCUMENTS])
    with indexed_writer(f"{tmp_path}/flat", np.dtype(np.uint16)) as writer:
        writer.add(flat, np.array([len(document) for document in DOCUMENTS], np.int32))
    one_by_one = write_dataset("single", DOCUMENTS)
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/flat{suffix}").read_bytes() == Path(one_by_one + suffix).read_bytes()


def test_megatron_core_reads_what_was_written(write_dataset):
    dataset = IndexedDataset(write_dataset("read", DOCUMENTS))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 65535, 65536, 65537, 150_000])
def test_the_token_type_is_the_one_megatron_core_writes(vocab_size):
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_an_error_leaves_nothing_and_spares_the_old_dataset(tmp_path, write_dataset):
    prefix = write_dataset("old", DOCUMENTS)
    before = Path(f"{prefix}.bin").read_bytes()
    with pytest.raises(KeyError), indexed_writer(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.ones(5, np.uint16), np.array([5], np.int32))
        raise KeyError
    assert sorted(os.listdir(tmp_path)) == ["old.bin", "old.idx"]
    assert Path(f"{prefix}.bin").read_bytes() == before


def test_what_a_killed_run_left_behind_does_not_get_into_the_next(tmp_path, write_dataset):
    for suffix in (".bin.tmp", ".idx.tmp"):
        (tmp_path / f"data{suffix}").write_bytes(b"left behind")
    assert read_index(write_dataset("data", DOCUMENTS)).num_tokens == sum(map(len, DOCUMENTS))
    assert sorted(os.listdir(tmp_path)) == ["data.bin", "data.idx"]


def test_two_writers_of_one_dataset_do_not_mix(tmp_path, write_dataset):
    with indexed_writer(f"{tmp_path}/same", np.dtype(np.uint16)) as writer:
        writer.add(np.ones(5, np.uint16), np.array([5], np.int32))
        with pytest.raises(ValueError, match="same.bin.tmp is being written by another process"):
            write_dataset("same", DOCUMENTS)
    assert read_index(f"{tmp_path}/same").lengths.tolist() == [5]


def test_replacing_a_dataset_drops_megatron_cores_cache_of_the_old_one(write_dataset):
    prefix = write_dataset("data", DOCUMENTS)
    cache = Path(prefix) / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)
    write_dataset("data", DOCUMENTS[:1])
    assert not cache.exists()


def test_a_truncated_bin_file_is_an_error_before_it_is_read(write_dataset):
    prefix = write_dataset("cut", DOCUMENTS)
    os.truncate(f"{prefix}.bin", 100)
    with pytest.raises(ValueError, match=r"cut.bin has 100 bytes where .*cut.idx says 412"):
        read_index(prefix)


def test_a_truncated_or_foreign_idx_file_is_an_error(write_dataset):
    prefix = write_dataset("cut", DOCUMENTS)
    os.truncate(f"{prefix}.idx", 60)
    with pytest.raises(ValueError, match="cut.idx is truncated"):
        read_index(prefix)
    Path(f"{prefix}.idx").write_text("something else entirely, but long enough")
    with pytest.raises(ValueError, match="cut.idx is not the index"):
        read_index(prefix)
