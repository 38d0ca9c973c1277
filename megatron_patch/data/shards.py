"""Input files cut into shards that workers read by themselves, none of them copied.

    for shard in plan(files, "line", shard_bytes(total)):      # in one process: looks at sizes and line ends only
        for record in ShardReader(shard, "line"): ...          # in any process

A shard is a range of bytes of a file of lines, some row groups of a parquet file, or a few whole files. What only one
process can read (standard input, a large compressed file) is read by the one that plans: such a shard carries its lines
with it. The cut depends on the input alone: shard 17 is shard 17 again when a killed run is repeated.

It does not know what becomes of a record.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from megatron_patch.data import readers
from megatron_patch.data.readers import STDIN, Record, open_stream, read_lines, read_records, read_rows

LEAST_BYTES, MOST_BYTES = 1 << 20, 64 << 20
_WANTED = 64
"""Shards to make of an input: enough for as many workers, and a killed run loses little."""
_CARRIED_BYTES = 8 << 20
"""Bytes that a shard carries with it at most, unless a line is longer."""


_ASKED = 64
"""Records between two looks at how far a file is read."""


class Piece(NamedTuple):
    """A file, or a part of one."""

    path: str
    start: int = 0
    """First byte, or first row group of a parquet file."""
    end: int | None = None
    """The byte or row group behind it; None: the whole file."""


class Shard(NamedTuple):
    """What one worker reads at a time."""

    number: int
    pieces: tuple[Piece, ...]
    disk_bytes: int
    """Size of it in the input files (compressed, if they are)."""
    lines: bytes | None = None
    """The lines of its only piece, if the reader could not get at them."""


def shard_bytes(total: int) -> int:
    """Size of the shards of an input of so many bytes."""
    return min(max(total // _WANTED, LEAST_BYTES), MOST_BYTES)


def plan(files: Iterable[Path], txt_document: str, size: int) -> Iterator[Shard]:
    """The shards of some files, in order; small files share one."""
    number, group, weight = 0, [], 0
    for piece, disk_bytes, lines in _pieces(files, txt_document, size):
        alone = lines is not None or weight + disk_bytes > size
        if alone and group:
            yield Shard(number, tuple(group), weight)
            number, group, weight = number + 1, [], 0
        if lines is not None:
            yield Shard(number, (piece,), disk_bytes, lines)
            number += 1
        else:
            group.append(piece)
            weight += disk_bytes
    if group:
        yield Shard(number, tuple(group), weight)


def _pieces(files: Iterable[Path], txt_document: str, size: int) -> Iterator[tuple[Piece, int, bytes | None]]:
    """Every piece with its size on disk, and its lines where it must carry them."""
    for path in files:
        if path == STDIN:
            for block in _blocks(sys.stdin.buffer, min(size, _CARRIED_BYTES)):
                yield Piece(str(path)), 0, block
        elif readers.is_parquet(path):
            yield from ((piece, weight, None) for piece, weight in _row_groups(path, size))
        elif os.path.getsize(path) <= size or not _has_lines(path, txt_document):
            yield Piece(str(path)), os.path.getsize(path), None
        elif readers.is_compressed(path):
            yield from _carried(path, min(size, _CARRIED_BYTES))
        else:
            cuts = [*_line_starts(path, size), os.path.getsize(path)]
            for start, end in zip(cuts, cuts[1:], strict=False):
                yield Piece(str(path), start, end), end - start, None


def _has_lines(path: Path, txt_document: str) -> bool:
    """Whether a file may be cut at any line."""
    if not readers.is_json(path):
        return txt_document == "line"
    with open(path, "rb") as raw, open_stream(raw, path) as stream:
        return not readers.is_array(path, stream)


def _line_starts(path: Path, size: int) -> Iterator[int]:
    """Places at which lines begin, the next one at least `size` bytes behind."""
    start, total = 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while start < total:
            yield start
            file.seek(start + size - 1)
            while (line := file.readline(MOST_BYTES)) and not line.endswith(b"\n"):
                pass
            start = file.tell()


def _carried(path: Path, size: int) -> Iterator[tuple[Piece, int, bytes]]:
    with open(path, "rb") as raw, open_stream(raw, path) as stream:
        before = 0
        for block in _blocks(stream, size):
            position = raw.tell()
            yield Piece(str(path)), position - before, block
            before = position


def _blocks(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """Whole lines, about so many bytes of them at a time."""
    while block := stream.read(size):
        yield block if block.endswith(b"\n") else block + stream.readline(readers.MAX_DOCUMENT_BYTES + 1)


def _row_groups(path: Path, size: int) -> Iterator[tuple[Piece, int]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        metadata = ParquetFile(path).metadata
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise readers.DamagedInput(f"{path}: cannot be read as parquet, is the file complete? ({error})") from None
    scale = os.path.getsize(path) / max(1, sum(sizes))  # they are counted uncompressed
    start, weight = 0, 0.0
    for group, plain in enumerate(sizes, start=1):
        weight += plain * scale
        if weight >= size or group == len(sizes):
            yield Piece(str(path), start, group), round(weight)
            start, weight = group, 0.0


class ShardReader:
    """The records of one shard, whose lines are numbered from the first of each piece."""

    def __init__(self, shard: Shard, txt_document: str) -> None:
        self._shard, self._txt_document = shard, txt_document
        self.position = 0
        """Bytes of the input files that are read."""
        self.lines = [0] * len(shard.pieces)
        """Lines, items or rows of each piece so far; for parts of a file only."""

    def __iter__(self) -> Iterator[Record]:
        for index, piece in enumerate(self._shard.pieces):
            if self._shard.lines is not None:
                yield from self._numbered(piece, index, io.BytesIO(self._shard.lines))
            else:
                yield from self._read(piece, index)
        self.position = self._shard.disk_bytes

    def _read(self, piece: Piece, index: int) -> Iterator[Record]:
        with open(piece.path, "rb") as raw:
            before = self.position - (0 if readers.is_parquet(piece.path) else piece.start)
            for number, record in enumerate(self._records(piece, index, raw)):
                if not number % _ASKED:  # a system call each time
                    self.position = before + raw.tell()
                yield record

    def _records(self, piece: Piece, index: int, raw: IO[bytes]) -> Iterator[Record]:
        if readers.is_parquet(piece.path):
            groups = None if piece.end is None else range(piece.start, piece.end)
            for record in read_rows(piece.path, raw, groups):
                self.lines[index] = record.line
                yield record
        elif piece.end is None:
            with open_stream(raw, Path(piece.path)) as stream:
                yield from read_records(Path(piece.path), stream, self._txt_document)
        else:
            raw.seek(piece.start)
            yield from self._numbered(piece, index, _Part(raw, piece.end - piece.start))

    def _numbered(self, piece: Piece, index: int, stream: IO[bytes]) -> Iterator[Record]:
        for number, line in read_lines(piece.path, stream):
            self.lines[index] = number
            if line.strip():
                yield Record(piece.path, number, line)


class _Part:
    """So many bytes of an open file, line by line."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def readline(self, limit: int) -> bytes:
        line = self._file.readline(min(limit, self._left))
        self._left -= len(line)
        return line
