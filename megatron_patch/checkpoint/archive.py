"""Files of ``torch.save``, without ever holding them in memory: written around holes, read by mapping.

`skeleton` is what ``torch.save`` writes for a value, less the tensors' bytes: where each tensor's bytes belong, and
where their CRC. Whoever writes fills the holes in any order. `Archive` reads such a file, or the part of a larger file
that is one, as a value whose tensors have shapes only, and maps one tensor at a time, checking its CRC. It knows
nothing of what is in the archives.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import torch
from isal.isal_zlib import crc32
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

ALIGNMENT = 64
"""Where tensors start in an archive, in bytes; an archive inside of a larger file should start so as well."""

_ZIP, _DESCRIPTOR, _CENTRAL = b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02"
_CENTRAL_SIZE = 46
_DAMAGED = (RuntimeError, EOFError, BadZipFile, ValueError, KeyError, AttributeError, struct.error)


# ------------------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Hole:
    """Where the bytes of one tensor belong, relative to the start of the archive."""

    offset: int
    nbytes: int
    checksums: tuple[int, ...]
    """Where the archive holds their CRC32, as a little-endian number of 4 bytes."""


@dataclass(frozen=True)
class Skeleton:
    """An archive without the bytes of its tensors."""

    chunks: tuple[tuple[int, bytes], ...]
    """Offset and content of everything else, less the CRCs: to write it again does no harm to tensors in place."""

    size: int
    holes: tuple[Hole, ...]
    """One a tensor, in the order in which the value holds them; tensors must not share memory or be empty."""

    def write(self, file: BinaryIO, start: int = 0) -> None:
        """Put everything but the tensors into an open file; the holes stay as they are."""
        for offset, content in self.chunks:
            pwrite(file.fileno(), content, start + offset)


def write_crc(file: BinaryIO, hole: Hole, start: int, crc: int) -> None:
    """Enter the CRC32 of a hole's bytes."""
    for offset in hole.checksums:
        pwrite(file.fileno(), struct.pack("<I", crc), start + offset)


def skeleton(value: Any) -> Skeleton:
    """What ``torch.save(value)`` writes. Tensors may be unwritten memory (``torch.empty``): they are not touched."""
    sink = _Sink()
    with skip_data():
        torch.save(value, sink)
    content = dict(sink.chunks)
    entries = _central_entries(sink.chunks)
    holes = []
    for offset, nbytes in sink.holes:
        after = offset + nbytes
        assert content[after][:4] == _DESCRIPTOR, "torch.save no longer writes a data descriptor"
        holes.append(Hole(offset, nbytes, (after + 4, entries[len(holes)])))
    spots = (spot for hole in holes for spot in hole.checksums)
    return Skeleton(tuple(_joined(_spared(sink.chunks, spots))), sink.position, tuple(holes))


def _joined(chunks: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The chunks, those that touch made one: torch writes in many small pieces."""
    start, together = 0, b""
    for offset, content in chunks:
        if offset != start + len(together):
            yield start, together
            start, together = offset, b""
        together += content
    yield start, together


def _spared(chunks: Sequence[tuple[int, bytes]], spots: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """The chunks without the 4 bytes at each spot."""
    left = sorted(spots, reverse=True)
    for offset, content in chunks:
        done = 0
        while left and left[-1] < offset + len(content):
            spot = left.pop() - offset
            yield offset + done, content[done:spot]
            done = spot + 4
        yield offset + done, content[done:]


def _central_entries(chunks: Sequence[tuple[int, bytes]]) -> list[int]:
    """Where the central directory holds the CRC of each ``data/i``, in order."""
    start, block = next((at, block) for at, block in chunks if block[:4] == _CENTRAL)
    found, position = {}, 0
    while block[position : position + 4] == _CENTRAL:
        name, extra, comment = struct.unpack_from("<3H", block, position + 28)
        path = block[position + _CENTRAL_SIZE : position + _CENTRAL_SIZE + name].decode()
        folder, _, number = path.rpartition("/")
        if folder.endswith("/data") and number.isdecimal():
            found[int(number)] = start + position + 16
        position += _CENTRAL_SIZE + name + extra + comment
    return [found[i] for i in sorted(found)]


class _Sink(io.RawIOBase):
    """Remembers what is written, and what is skipped by seeking forward."""

    def __init__(self) -> None:
        self.position = 0
        self.chunks: list[tuple[int, bytes]] = []
        self.holes: list[tuple[int, int]] = []

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def write(self, data: Any) -> int:
        self.chunks.append((self.position, bytes(data)))
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_CUR and offset > 0, "torch.save skips a tensor's bytes by seeking over them"
        self.holes.append((self.position, offset))
        self.position += offset
        return self.position


def pwrite(descriptor: int, data: Any, offset: int) -> None:
    """Write all of the data at an offset."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


# ------------------------------------------------------------------------------------------------------------ reading


class MappedFile:
    """A file mapped for reading: its pages are page cache, not memory of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None

    def expect(self, start: int, stop: int) -> None:
        """Have these bytes read from disk in the background: they are wanted soon."""
        if self._map is not None and stop > start:
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, min(stop, self.size) - first)

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes of it; a ValueError where it is too short."""
        if self._map is None:
            raise ValueError(f"{self.path} is empty")
        if stop > self.size:
            raise ValueError(f"{self.path} is truncated: {self.size} bytes, {stop} needed")
        return memoryview(self._map)[start:stop]


class Archive:
    """One archive: a whole file, or `length` bytes of one from `start`.

    Args:
        trusted: unpickle it even where torch's restricted unpickler refuses. Pickles can run any code.
        allowed: classes that the restricted unpickler may rebuild besides its own.

    Raises:
        ValueError: it is damaged, or needs `trusted`.
    """

    def __init__(
        self,
        file: MappedFile,
        start: int = 0,
        length: int | None = None,
        *,
        trusted: bool = False,
        allowed: Sequence[Any] = (),
        pickle_module: Any = None,
    ) -> None:
        self._file, self._start = file, start
        self._window = _Window(file.view(start, file.size if length is None else start + length))
        self._intact: set[int] = set()
        self.value = self._load(trusted, allowed, pickle_module)

    def _load(self, trusted: bool, allowed: Sequence[Any], pickle_module: Any) -> Any:
        if self._window.data[: len(_ZIP)] != _ZIP:  # torch would take it for a pickle, and speak of unsafe code
            raise ValueError(f"{self._file.path} is damaged or no file of torch.save (since 1.6): it is no zip archive")
        options = {"pickle_module": pickle_module} if trusted and pickle_module else {}
        try:
            with warnings.catch_warnings(), FakeTensorMode(), torch.serialization.safe_globals(list(allowed)):
                warnings.simplefilter("ignore")  # about torch's own storages, for every file
                return torch.load(self._window, map_location="cpu", weights_only=not trusted, **options)
        except UnpicklingError as error:
            raise ValueError(f"{self._file.path} cannot be read safely: {_first_line(error)}") from error
        except _DAMAGED as error:
            raise ValueError(f"{self._file.path} is damaged or no file of torch.save: {_first_line(error)}") from error

    @cached_property
    def _crcs(self) -> Mapping[int, int]:
        """Offset of a tensor's bytes -> their CRC32."""
        with ZipFile(io.BufferedReader(_Window(self._window.data))) as archive:
            records = [one for one in archive.infolist() if "/data/" in one.filename]
        return {self._offset_of(one.header_offset): one.CRC for one in records}

    def _offset_of(self, header: int) -> int:
        name, extra = struct.unpack_from("<2H", self._window.data, header + 26)
        return header + 30 + name + extra

    def expect(self, fake: Tensor) -> None:
        """Have the tensor's bytes read from disk in the background."""
        start = self._start + fake.untyped_storage()._checkpoint_offset + fake.storage_offset() * fake.itemsize
        self._file.expect(start, start + fake.numel() * fake.itemsize)

    def read(self, fake: Tensor) -> Tensor:
        """The real tensor for one of the value's, mapped; not to be written to.

        Raises:
            ValueError: its bytes do not match their CRC, or are missing.
        """
        storage = fake.untyped_storage()
        offset, nbytes = storage._checkpoint_offset, storage.nbytes()
        view = self._window.data[offset : offset + nbytes]
        if offset not in self._intact and (len(view) != nbytes or crc32(view) != self._crcs.get(offset)):
            raise ValueError(f"{self._file.path}: bytes {self._start + offset} and following do not match their CRC")
        self._intact.add(offset)  # a training run keeps all its weights in one storage: once is enough
        return from_bytes(view, fake.dtype, fake.storage_offset(), fake.shape, fake.stride())


def from_bytes(
    view: memoryview, dtype: torch.dtype, first: int, shape: Sequence[int], stride: Sequence[int] | None = None
) -> Tensor:
    """A tensor over bytes (copied only where they are not aligned for its dtype)."""
    if math.prod(shape) == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the memory is read-only, as it should be
        data = torch.frombuffer(view, dtype=torch.uint8)
    data = data if data.data_ptr() % dtype.itemsize == 0 else data.clone()
    flat = data.view(dtype)
    return flat[first:].view(tuple(shape)) if stride is None else flat.as_strided(tuple(shape), tuple(stride), first)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


class _Window(io.RawIOBase):
    """Bytes as a file."""

    def __init__(self, data: memoryview) -> None:
        self.data, self._position = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self.data)}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self.data[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)
