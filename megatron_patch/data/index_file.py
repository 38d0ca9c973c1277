"""The index of a dataset as it lies on the disk, every section of it, and what is wrong with it.

`megatron_patch.data.indexed` reads what training needs and refuses the rest at once; the tools that judge, join and
show datasets start here. Documents may be several sequences (Megatron-LM's --split-sentences), sequences may have
modes (multimodal data). It does not know tokenizers or text, and reads no token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_patch.data.indexed import CODES, HEADER, MAGIC, read_head

_CHUNK = 1 << 20
"""Entries of an index that are in memory at a time."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with a dataset, and where."""

    message: str
    """What is wrong."""
    file: str
    """The file in which it is wrong."""
    document: int | None = None
    """Number of the document concerned, from 0; None: no one document."""
    offset: int | None = None
    """Byte of the file; None: no one place."""

    def __str__(self) -> str:
        document = "" if self.document is None else f"document {self.document}, "
        byte = "" if self.offset is None else f"byte {self.offset} of "
        return f"{document}{byte}{self.file}: {self.message}"


@dataclass(frozen=True)
class IndexFile:
    """The sections of an .idx file, memory-mapped; nothing promises that they make sense."""

    prefix: str
    """The dataset's path without .idx or .bin."""
    dtype: np.dtype
    """Type of a token id in the .bin file."""
    lengths: np.ndarray
    """int32 [S]: tokens of each sequence."""
    pointers: np.ndarray
    """int64 [S]: the byte of the .bin file at which each sequence starts."""
    marks: np.ndarray
    """int64 [D + 1]: the first sequence of each document, and S at the end."""
    modes: np.ndarray | None
    """int8 [S]: the mode of each sequence, in multimodal datasets."""

    @property
    def num_sequences(self) -> int:
        """Sequences in the dataset."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Documents in the dataset."""
        return len(self.marks) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens that the lengths add up to."""
        return int(self.lengths.sum(dtype=np.int64))

    def bounds(self) -> np.ndarray:
        """int64 [D + 1]: the number of the first token of each document, and that of all tokens at the end."""
        before = np.zeros(self.num_sequences + 1, np.int64)
        np.cumsum(self.lengths, out=before[1:], dtype=np.int64)
        return before[self.marks]

    def document_of(self, sequence: int) -> int:
        """Number of the document that holds a sequence."""
        return int(np.searchsorted(self.marks, sequence, "right")) - 1


def open_index(prefix: str) -> IndexFile:
    """Opens PREFIX.idx; ValueError if it is no index, of no known kind, of no document, or cut off."""
    path = f"{prefix}.idx"
    size, (dtype, sequences, marks) = os.path.getsize(path), read_head(path)
    if not sequences or marks < 2:
        raise ValueError(f"{path} holds no document")
    expected = HEADER.size + 12 * sequences + 8 * marks
    if size not in (expected, expected + sequences):
        raise ValueError(
            f"{path} has {size} bytes where {sequences} sequences and {marks - 1} documents need {expected} "
            f"(or {expected + sequences} with modes)"
        )
    return _sections(prefix, dtype, sequences, marks, size > expected)


def _sections(prefix: str, dtype: np.dtype, sequences: int, marks: int, with_modes: bool) -> IndexFile:
    path, offset, found = f"{prefix}.idx", HEADER.size, []
    kinds = [(np.int32, sequences), (np.int64, sequences), (np.int64, marks), (np.int8, sequences)]
    for kind, count in kinds if with_modes else kinds[:3]:
        # An ndarray, so that nothing computed from it claims to be a file.
        found.append(np.memmap(path, kind, "r", offset=offset, shape=(count,)).view(np.ndarray))
        offset += found[-1].nbytes
    return IndexFile(prefix, dtype, *found[:3], found[3] if with_modes else None)


# ---------------------------------------------------------------------------------------------------- what may be wrong


def structure_problems(index: IndexFile) -> Iterator[Problem]:
    """Everything wrong with an index in itself and beside its .bin file, found without reading a token."""
    yield from _mark_problems(index)
    yield from _sequence_problems(index)
    yield from _size_problems(index)


def _mark_problems(index: IndexFile) -> Iterator[Problem]:
    path, start = f"{index.prefix}.idx", HEADER.size + 12 * index.num_sequences
    if index.marks[0] != 0:
        yield Problem(f"the first document starts at sequence {index.marks[0]}, not 0", path, 0, start)
    if index.marks[-1] != index.num_sequences:
        message = (
            f"the last document ends at sequence {index.marks[-1]}, the last sequence is {index.num_sequences - 1}"
        )
        yield Problem(message, path, index.num_documents - 1, start + 8 * index.num_documents)
    for begin in range(0, index.num_documents, _CHUNK):
        marks = index.marks[begin : begin + _CHUNK + 1]
        for document in begin + np.flatnonzero(np.diff(marks) < 0):
            message = (
                f"its first sequence is {index.marks[document]}, that of the next document {index.marks[document + 1]}"
            )
            yield Problem(message, path, int(document), start + 8 * int(document))


def _sequence_problems(index: IndexFile) -> Iterator[Problem]:
    """Lengths that are none, and starts that are not where the sequence before ends."""
    path, first = f"{index.prefix}.idx", HEADER.size
    expected = 0
    for begin in range(0, index.num_sequences, _CHUNK):
        lengths = index.lengths[begin : begin + _CHUNK].astype(np.int64)
        pointers = index.pointers[begin : begin + _CHUNK]
        for sequence in map(int, begin + np.flatnonzero(lengths < 0)):
            message = f"sequence {sequence} has a length of {index.lengths[sequence]} tokens"
            yield Problem(message, path, index.document_of(sequence), first + 4 * sequence)
        ends = pointers + lengths * index.dtype.itemsize
        wanted = np.concatenate([[expected], ends[:-1]])
        for sequence in map(int, begin + np.flatnonzero(pointers != wanted)):
            place = first + 4 * index.num_sequences + 8 * sequence
            message = (
                f"sequence {sequence} starts at byte {index.pointers[sequence]} of the .bin file, "
                f"the one before ends at {wanted[sequence - begin]}"
            )
            yield Problem(message, path, index.document_of(sequence), place)
        expected = int(ends[-1])


def _size_problems(index: IndexFile) -> Iterator[Problem]:
    path = f"{index.prefix}.bin"
    actual, expected = os.path.getsize(path), index.num_tokens * index.dtype.itemsize
    if actual > expected:
        yield Problem(f"the file has {actual} bytes, the index knows of {expected}", path, None, expected)
    if actual < expected:
        cut = max(0, int(np.searchsorted(index.pointers, actual, "right")) - 1)
        message = f"the file ends in this document: it has {actual} bytes where the index says {expected}"
        yield Problem(message, path, index.document_of(cut), actual)


# -------------------------------------------------------------------------------------------------------------- joining


def joined(parts: list[IndexFile], dtype: np.dtype) -> Iterator[bytes]:
    """The contents of the .idx file of several datasets joined in order, their tokens stored as `dtype`.

    Byte for byte what `IndexedDatasetBuilder.add_index` and `finalize` of megatron-core write. The parts must be in
    order (`structure_problems`), and all or none must have modes.
    """
    sequences, documents = sum(part.num_sequences for part in parts), sum(part.num_documents for part in parts)
    yield HEADER.pack(MAGIC, 1, CODES[dtype], sequences, documents + 1)
    yield from (lengths.tobytes() for part in parts for lengths in _chunks(part.lengths))
    before = 0
    for part in parts:
        for pointers in _chunks(part.pointers):
            # In tokens in between: the types of a part and of the whole may differ in size.
            yield ((pointers // part.dtype.itemsize + before) * dtype.itemsize).tobytes()
        before += part.num_tokens
    yield np.int64(0).tobytes()
    before = 0
    for part in parts:
        yield from ((marks + before).tobytes() for marks in _chunks(part.marks[1:]))
        before += part.num_sequences
    yield from (modes.tobytes() for part in parts if part.modes is not None for modes in _chunks(part.modes))


def _chunks(section: np.ndarray) -> Iterator[np.ndarray]:
    return (section[begin : begin + _CHUNK] for begin in range(0, len(section), _CHUNK))
