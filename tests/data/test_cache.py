"""Data rebuilt at the same prefix, by megatron-core's own builder, which leaves the cached indices of the old data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_patch.data.arguments import DataSpec
from megatron_patch.data.datasets import build_datasets
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from tests.data.test_datasets import core_dataset

Documents = list[list[int]]
Samples = Callable[[], Documents]
SEQ = 16
OLD: Documents = [[1 + (i + j) % 500 for j in range(50)] for i in range(200)]
REBUILT = {
    "fewer documents": OLD[:40],
    "shorter documents": [document[:20] for document in OLD],
    "the same lengths in another order": [OLD[i][:10] if i % 2 else OLD[i] for i in range(200)],
    "other ids": [[id + 1 for id in document] for document in OLD],
}


@pytest.fixture(scope="module")
def tokenizer(bpe: str) -> Tokenizer:
    return load_tokenizer(bpe)


def rebuild(prefix: str, documents: Documents) -> None:
    """What Megatron-LM's script does: nothing but the two files."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")


def read(prefix: str, cache: str | None, tokenizer: Tokenizer, wanted: int = 1) -> Documents:
    spec = DataSpec(data_path=(prefix,), split="1", seq_length=SEQ, data_cache_path=cache)
    train, _, _ = build_datasets(spec, tokenizer, (wanted, 0, 0))
    return [[*train[i]["tokens"].tolist(), int(train[i]["labels"][-1])] for i in range(len(train))]


@pytest.mark.parametrize("cache", [None, "cache"])
@pytest.mark.parametrize("change", REBUILT)
def test_rebuilt_data_is_read_as_if_it_had_been_built_afresh(
    change: str, cache: str | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shared = cache and f"{tmp_path}/{cache}"
    prefix, fresh = f"{tmp_path}/data", f"{tmp_path}/fresh"
    before = [[*document[: len(document) // (1 + i % 2)]] for i, document in enumerate(OLD)]
    rebuild(prefix, before if change == "the same lengths in another order" else OLD)
    old = read(prefix, shared, tokenizer)
    rebuild(prefix, REBUILT[change])
    rebuild(fresh, REBUILT[change])
    found = read(prefix, shared, tokenizer)
    assert found == read(fresh, f"{tmp_path}/another", tokenizer) != old


def test_both_versions_of_the_data_keep_their_indices(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prefix, cache = f"{tmp_path}/data", tmp_path / "cache"
    for documents in (OLD, OLD[:40], OLD):
        rebuild(prefix, documents)
        read(prefix, str(cache), tokenizer)
    assert len(list(cache.iterdir())) == 2


def test_a_touched_or_moved_on_file_keeps_its_indices(tokenizer: Tokenizer, tmp_path: Path) -> None:
    # Copies on several machines have times of their own; their ranks must still find what rank 0 built.
    prefix, cache = f"{tmp_path}/data", tmp_path / "cache"
    rebuild(prefix, OLD)
    read(prefix, str(cache), tokenizer)
    for suffix in (".bin", ".idx"):
        Path(prefix + suffix).touch()
    read(prefix, str(cache), tokenizer)
    assert len(list(cache.iterdir())) == 1


def test_megatron_core_alone_reads_rebuilt_data_through_the_old_index(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prefix, cache = f"{tmp_path}/data", tmp_path / "cache"
    rebuild(prefix, OLD)
    expected = len(core_dataset(prefix, tokenizer, 1, (0.0, 1.0), Split.train, cache))
    rebuild(prefix, OLD[:40])
    assert len(IndexedDataset(prefix)) == 40
    stale = core_dataset(prefix, tokenizer, 1, (0.0, 1.0), Split.train, cache)
    assert len(stale) == expected  # the trap that the tests above would fall into
    with pytest.raises(IndexError):
        for index in range(len(stale)):
            stale[index]
