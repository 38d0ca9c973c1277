"""The indexed dataset of megatron-core on disk: written and checked with numpy alone.

`PREFIX.bin` holds the token ids of all documents one after another. `PREFIX.idx` holds, little-endian: magic, version,
dtype code, number of sequences S, number of document marks D + 1; then int32[S] lengths in tokens, int64[S] starts in
bytes, int64[D + 1] document marks. Here one sequence is one document. Both files are byte for byte those of
`megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder`, which would need torch to write them.

It does not know tokenizers or text.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are floats: not tokens.
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that megatron-core uses for a vocabulary.

    uint16 would also hold 65500..65536 ids, but core writes int32 from 65500 on.
    """
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Collects the documents of one dataset. Made by `indexed_writer`."""

    def __init__(self, bin_file: IO[bytes], dtype: np.dtype) -> None:
        self.dtype = dtype
        self._bin_file = bin_file
        self._lengths: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents: their token ids laid end to end, and the length of each."""
        assert tokens.dtype == self.dtype and int(lengths.sum()) == tokens.size
        self._bin_file.write(tokens.tobytes())
        self._lengths.append(lengths.astype(np.int32))

    def index_bytes(self) -> list[bytes]:
        """The contents of the .idx file."""
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        count = len(lengths)
        starts = np.zeros(count, np.int64)
        np.cumsum(lengths[:-1], out=starts[1:], dtype=np.int64)
        header = HEADER.pack(MAGIC, 1, CODES[self.dtype], count, count + 1)
        marks = np.arange(count + 1, dtype=np.int64)
        return [header, lengths.tobytes(), (starts * self.dtype.itemsize).tobytes(), marks.tobytes()]


@contextmanager
def indexed_writer(prefix: str, dtype: np.dtype) -> Iterator[IndexedWriter]:
    """Writes PREFIX.bin and PREFIX.idx; see `pair`."""
    with pair(prefix) as files:
        writer = IndexedWriter(files.bin, dtype)
        yield writer
        files.idx.writelines(writer.index_bytes())


class Pair(NamedTuple):
    """The two files of a dataset in the making."""

    bin: IO[bytes]
    idx: IO[bytes]


@contextmanager
def pair(prefix: str) -> Iterator[Pair]:
    """PREFIX.bin and PREFIX.idx under temporary names; they appear when the block ends without an error.

    The .idx comes last, and nothing opens a dataset without it. Raises ValueError if another process is writing here.
    """
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    bin_tmp, idx_tmp = Path(f"{prefix}.bin.tmp"), Path(f"{prefix}.idx.tmp")
    with locked(bin_tmp) as bin_file:
        try:
            with open(idx_tmp, "wb") as idx_file:
                yield Pair(bin_file, idx_file)
                sync(bin_file)
                sync(idx_file)
            publish(prefix, bin_tmp, idx_tmp)
        except BaseException:
            bin_tmp.unlink(missing_ok=True)
            idx_tmp.unlink(missing_ok=True)
            raise


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for one writer. A killed run's leftovers are overwritten; the lock of a living run is respected."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another process") from None
        # The other run may have renamed the file between our open and our lock: it is then a finished dataset.
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise ValueError(f"another process has just finished writing {path}; start again")
        file.truncate(0)
        yield file


def sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file under a temporary name, which takes the place of `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            sync(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish(prefix: str, bin_tmp: Path, idx_tmp: Path) -> None:
    """Puts the finished files in place of any older ones.

    megatron-core names its cached sample indices after the path of a dataset, not its content: an index of the
    replaced dataset would be used for the new one, and samples would point outside it.
    """
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    shutil.rmtree(Path(prefix) / "cache", ignore_errors=True)
    os.replace(bin_tmp, f"{prefix}.bin")
    os.replace(idx_tmp, f"{prefix}.idx")
    directory = os.open(Path(prefix).parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@dataclass(frozen=True)
class IndexInfo:
    """What the .idx file of a dataset says."""

    dtype: np.dtype
    """Type of a token id in the .bin file."""
    lengths: np.ndarray
    """Number of tokens of each sequence, in file order (memory-mapped)."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the whole dataset."""
        return int(self.lengths.sum(dtype=np.int64))


def read_head(path: str) -> tuple[np.dtype, int, int]:
    """(type of a token id, number of sequences, number of marks) of an .idx file; ValueError if it is none."""
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{path} is not the index of a megatron-core dataset")
    _, version, code, sequences, marks = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise ValueError(f"{path}: version {version} and token type {code}; known are version 1, types {[*DTYPES]}")
    return np.dtype(DTYPES[code]), sequences, marks


def read_index(prefix: str) -> IndexInfo:
    """Reads PREFIX.idx and checks it, and the size of PREFIX.bin, which megatron-core does not look at."""
    path = f"{prefix}.idx"
    size, (dtype, sequences, marks) = os.path.getsize(path), read_head(path)
    if size < HEADER.size + 12 * sequences + 8 * marks:
        raise ValueError(f"{path} is truncated: {size} bytes are too few for {sequences} sequences")
    if sequences == 0:
        raise ValueError(f"dataset {prefix} holds no document")
    lengths = np.memmap(path, np.int32, "r", offset=HEADER.size, shape=(sequences,))
    info = IndexInfo(dtype, lengths)
    expected, actual = info.num_tokens * info.dtype.itemsize, os.path.getsize(f"{prefix}.bin")
    if expected != actual:
        raise ValueError(f"{prefix}.bin has {actual} bytes where {path} says {expected}: truncated, or not a pair")
    return info
