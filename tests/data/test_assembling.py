"""Documents shaped, ordered and divided: each rule against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_patch.data import assembling
from megatron_patch.data.assembling import Documents, orders, read_documents, write
from megatron_patch.data.indexed import read_index
from megatron_patch.data.tokenizing import key_file, shape_documents

EOD = 9


def plain(texts: list[list[int]], eod: int | None, most: int | None) -> list[list[int]]:
    """What `shape_documents` should make of texts."""
    documents = []
    for text in texts:
        if not text:
            continue
        body = text[:-1] if eod is not None and text[-1] == eod else text
        room = len(body) or 1 if most is None else most - (eod is not None)
        for start in range(0, max(1, len(body)), room):
            documents.append(body[start : start + room] + ([] if eod is None else [eod]))
    return documents


TEXTS = [[1], [1, 2, 3, 4, 5, 6, 7], [], [1, 2, EOD], [EOD], [1, 2, 3, 4], [], [1, 2, 3, 4, EOD], [3, EOD, 3, 1, 1]]


@pytest.mark.parametrize("eod", [None, EOD])
@pytest.mark.parametrize("most", [None, 2, 3, 4, 5, 100])
@pytest.mark.parametrize("texts", [TEXTS, [[]], TEXTS[:1], TEXTS[4:5], [[], [EOD]]], ids=range(5))
def test_long_documents_are_cut_and_every_one_has_one_end(texts, eod, most):
    ids = np.array(sum(texts, []), np.uint16)
    flat, lengths, pieces = shape_documents(ids, np.array([len(text) for text in texts], np.int64), eod, most)
    got = [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])] if len(lengths) else []
    assert got == plain(texts, eod, most)
    assert pieces.tolist() == [len(plain([text], eod, most)) for text in texts]
    assert (flat.dtype, lengths.dtype) == (np.uint16, np.int32)


def make_shards(directory, documents: list[list[list[int]]], index: int = 0) -> None:
    for number, shard in enumerate(documents):
        np.array(sum(shard, []), np.int32).tofile(key_file(directory, number, index, "bin"))
        np.array([len(document) for document in shard], np.int32).tofile(key_file(directory, number, index, "len"))


@pytest.mark.parametrize("block", [8, 40, 10**6])
def test_documents_are_written_in_the_order_asked_for_whatever_the_blocks(block, tmp_path, monkeypatch):
    monkeypatch.setattr(assembling, "_BLOCK_BYTES", block)
    draw = np.random.RandomState(0)
    documents = [[draw.randint(0, 99, draw.randint(1, 9)).tolist() for _ in range(count)] for count in (7, 0, 5, 1)]
    make_shards(tmp_path, documents)
    flat = sum(documents, [])
    found = read_documents(tmp_path, range(4), 0)
    assert found.lengths.tolist() == list(map(len, flat))
    for order in (np.arange(13), draw.permutation(13), np.array([3, 4, 5, 11])):
        dataset = write(f"{tmp_path}/out", tmp_path, found.take(order), 0, np.dtype(np.int32))
        tokens = np.fromfile(f"{tmp_path}/out.bin", np.int32).tolist()
        assert tokens == sum((flat[i] for i in order), []) and dataset.max_id == max(tokens)
        assert read_index(f"{tmp_path}/out").lengths.tolist() == [len(flat[i]) for i in order]
        assert (dataset.documents, dataset.tokens) == (len(order), len(tokens))


def test_a_shard_that_was_shortened_meanwhile_is_an_error_and_not_noise(tmp_path):
    make_shards(tmp_path, [[[1, 2, 3], [4, 5]]])
    found = read_documents(tmp_path, [0], 0)
    np.array([1, 2, 3], np.int32).tofile(key_file(tmp_path, 0, 0, "bin"))
    with pytest.raises(OSError, match="a shard is shorter than its list of documents"):
        write(f"{tmp_path}/out", tmp_path, found, 0, np.dtype(np.int32))
    assert not list(tmp_path.glob("out*"))


def test_without_seed_and_shares_the_order_is_that_of_the_input():
    assert {name: order.tolist() for name, order in orders(5, None, ()).items()} == {"": [0, 1, 2, 3, 4]}


def test_a_seed_shuffles_and_the_same_seed_does_so_again():
    first, again, other = (orders(1000, seed, ())[""] for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any() and sorted(first) == list(range(1000))


@pytest.mark.parametrize("shuffle", [None, 3])
def test_splits_share_all_documents_out_by_their_shares_and_at_random(shuffle):
    parts = orders(1000, shuffle, (90, 9, 1))
    assert {name: len(part) for name, part in parts.items()} == {"train": 900, "valid": 90, "test": 10}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1000))
    assert all((np.sort(part) == part).all() == (shuffle is None) for part in parts.values())
    assert 300 < parts["valid"].mean() < 700, "not the end of the input"


def test_a_split_without_a_share_is_not_made_and_one_without_a_document_is_an_error():
    assert list(orders(10, None, (90, 0, 10))) == ["train", "test"]
    with pytest.raises(ValueError, match="--split: 10 documents are too few for valid to have one"):
        orders(10, None, (98, 1, 1))


def test_only_neighbours_in_both_places_are_read_at_once(tmp_path):
    """Runs of documents are joined; documents that lie side by side in a shard but not in the output are not."""
    make_shards(tmp_path, [[[1], [2], [3]], [[4], [5]]])
    found = Documents(np.array([0, 1, 0], np.int32), np.array([1, 0, 2]), np.array([1, 1, 1], np.int32))
    write(f"{tmp_path}/out", tmp_path, found, 0, np.dtype(np.int32))
    assert np.fromfile(f"{tmp_path}/out.bin", np.int32).tolist() == [2, 4, 3]
    found = Documents(np.array([0, 1], np.int32), np.array([0, 1]), np.array([1, 1], np.int32))
    write(f"{tmp_path}/out", tmp_path, found, 0, np.dtype(np.int32))
    assert np.fromfile(f"{tmp_path}/out.bin", np.int32).tolist() == [1, 5]
