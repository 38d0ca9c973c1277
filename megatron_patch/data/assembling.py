"""Tokenized shards put together into datasets: duplicates left out, shuffled and divided by document if wanted.

Everything that needs the whole corpus happens here, in the order of the input and with a few bytes a document in
memory; tokens pass through in blocks. It does not know text or tokenizers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_patch.data.arguments import SPLITS, DedupArgs
from megatron_patch.data.dedup import Deduplicator, Fingerprints
from megatron_patch.data.indexed import indexed_writer
from megatron_patch.data.tokenizing import key_file
from megatron_patch.progress import Progress

_BLOCK_BYTES = 64 << 20
"""Tokens that are in memory at a time, unless a document is longer."""
SPLIT_SEED = 1234
"""Seed of the choice of documents for each split, unless --shuffle gives one."""


@dataclass(frozen=True)
class Dataset:
    """A dataset that was written."""

    prefix: str
    """Its path without .bin and .idx."""
    documents: int
    """Its documents."""
    tokens: int
    """Its tokens, ends of documents included."""
    max_id: int
    """The largest id in it."""
    output_bytes: int
    """Size of the .bin and .idx files."""


class Documents(NamedTuple):
    """Where N documents lie, in the order of the input."""

    shards: np.ndarray
    """int32[N]: number of the shard."""
    starts: np.ndarray
    """int64[N]: number of the first token in it."""
    lengths: np.ndarray
    """int32[N]: tokens."""

    def take(self, chosen: np.ndarray) -> Documents:
        """Those with these numbers, or where a mask is true."""
        return Documents(*(column[chosen] for column in self))


def read_documents(directory: Path, shards: Sequence[int], index: int) -> Documents:
    """The documents of one key in all shards."""
    lengths = [np.fromfile(key_file(directory, shard, index, "len"), np.int32) for shard in shards]
    starts = [np.cumsum(part, dtype=np.int64) - part for part in lengths]
    numbers = np.repeat(np.array(shards, np.int32), [len(part) for part in lengths])
    return Documents(
        numbers,
        np.concatenate([np.empty(0, np.int64), *starts]),
        np.concatenate([np.empty(0, np.int32), *lengths]),
    )


def without_duplicates(
    directory: Path, shards: Sequence[int], index: int, args: DedupArgs
) -> tuple[np.ndarray, Counter[str]]:
    """Which documents to keep (bool[N]), and how many texts are left out for which reason."""
    deduplicator, kept, skipped = Deduplicator(args), [np.empty(0, bool)], Counter[str]()
    for shard in shards:
        path = key_file(directory, shard, index, "npz")
        if not path.is_file():  # nothing of this shard was a document
            continue
        with np.load(path) as file:
            reasons = deduplicator.judge(Fingerprints(*(file[name] for name in Fingerprints._fields)))
            kept.append(np.repeat([reason is None for reason in reasons], file["pieces"]).astype(bool))
        skipped.update(reason for reason in reasons if reason is not None)
    return np.concatenate(kept), skipped


def orders(documents: int, shuffle: int | None, shares: Sequence[float]) -> dict[str, np.ndarray]:
    """Split -> the numbers of its documents in the order to be written; the only split is "" without shares.

    Documents are drawn at random, the same ones every time; without `shuffle` each split keeps the order of the input.
    """
    seed = SPLIT_SEED if shuffle is None else shuffle
    # Not default_rng: the numbers that RandomState draws are the same in every version of numpy.
    drawn = np.random.RandomState(seed).permutation(documents)
    if not shares:
        return {"": np.arange(documents) if shuffle is None else drawn}
    bounds = np.rint(np.cumsum([0, *shares]) / sum(shares) * documents).astype(int)
    parts = {name: drawn[start:end] for name, start, end in zip(SPLITS, bounds, bounds[1:], strict=False)}
    empty = [name for name, share in zip(SPLITS, shares, strict=False) if share and not len(parts[name])]
    if empty:
        raise ValueError(
            f"--split: {documents} documents are too few for {empty[0]} to have one; give it a larger share"
        )
    return {name: part if shuffle is not None else np.sort(part) for name, part in parts.items() if len(part)}


def write(prefix: str, directory: Path, documents: Documents, index: int, dtype: np.dtype) -> Dataset:
    """Writes documents, in the order given, as one dataset."""
    total = int(documents.lengths.sum(dtype=np.int64))
    largest = 0
    with (
        Progress(f"write {Path(prefix).name}", total * dtype.itemsize, "B") as progress,
        indexed_writer(prefix, dtype) as writer,
    ):
        for block in _blocks(documents, _BLOCK_BYTES // dtype.itemsize):
            tokens = _gather(directory, block, index, dtype)
            writer.add(tokens, block.lengths)
            largest = max(largest, int(tokens.max(initial=0)))
            progress(tokens.nbytes)
    size = sum(os.path.getsize(f"{prefix}{suffix}") for suffix in (".bin", ".idx"))
    return Dataset(prefix, len(documents.lengths), total, largest, size)


def _blocks(documents: Documents, tokens: int) -> Iterator[Documents]:
    """Documents of about so many tokens at a time."""
    ends = np.cumsum(documents.lengths, dtype=np.int64)
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        behind = max(first + 1, int(np.searchsorted(ends, before + tokens, "right")))
        yield documents.take(np.arange(first, behind))
        first = behind


def _gather(directory: Path, block: Documents, index: int, dtype: np.dtype) -> np.ndarray:
    """The tokens of documents, end to end: read in the order in which they lie in the shards."""
    ends = np.cumsum(block.lengths, dtype=np.int64)
    tokens = np.empty(int(ends[-1]), dtype)
    places = ends - block.lengths
    order = np.lexsort((block.starts, block.shards))
    shards, starts, lengths = block.take(order)
    places = places[order]
    behind = np.stack([starts + lengths, places + lengths])
    joins = (shards[1:] == shards[:-1]) & (behind[0, :-1] == starts[1:]) & (behind[1, :-1] == places[1:])
    firsts = np.flatnonzero(np.concatenate([[True], ~joins]))
    lasts = np.append(firsts[1:], len(order)) - 1
    runs = zip(shards[firsts].tolist(), starts[firsts].tolist(), places[firsts], behind[1, lasts], strict=True)
    for shard, group in groupby(runs, key=itemgetter(0)):
        with open(key_file(directory, shard, index, "bin"), "rb", buffering=0) as file:
            for _, start, place, end in group:
                _read_into(file.fileno(), tokens[place:end], start * dtype.itemsize)
    return tokens


def _read_into(descriptor: int, tokens: np.ndarray, offset: int) -> None:
    view = memoryview(tokens).cast("B")
    while len(view):
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise OSError("a shard is shorter than its list of documents: it was changed meanwhile")
        view, offset = view[count:], offset + count
