"""Moves tensors from a `Source` into the files of a `Target`: a few at a time, in threads, noted in a journal.

Each tensor is read, cast, checked, split, and written to its places; from time to time what was written is forced to
disk and only then noted, so that a killed conversion can go on. It decides nothing about formats, files or names.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from isal.isal_zlib import crc32
from torch import Tensor

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint.archive import pwrite, write_crc
from megatron_patch.checkpoint.crew import Crew
from megatron_patch.checkpoint.formats import Slot, Source, Target, cast
from megatron_patch.checkpoint.manifest import Checker, Entry, Journal, checksum, data_of, dtype_name, nonfinite
from megatron_patch.checkpoint.recycling import Pool

Progress = Callable[[str, int, int], None]
"""Called after each tensor with its name, the bytes done and the bytes in all."""

THREADS = 2
MEMORY = 560 * 2**20
"""Bytes of tensors that may be in work at a time; a tensor that alone needs more is worked on alone."""

_SETTLE = 2**28
"""After so many bytes, what was written is forced to disk and noted in the journal."""


class Mover:
    """Moves the tensors of one process's files, in threads."""

    def __init__(
        self, source: Source, target: Target, staged: Path, crew: Crew, progress: Progress | None = None
    ) -> None:
        self._source, self._target, self._staged, self._crew = source, target, staged, crew
        self._mine = crew.share(target.payload)
        self._slots: dict[str, Mapping[str, Slot]] = {}
        self._checker = Checker(source.weights_folder)
        self._pool, self._memory = Pool(MEMORY), _Memory(MEMORY)
        self._progress = progress or (lambda name, done, total: None)
        self._lock = threading.Lock()
        self._done, self._total = 0, sum(target.payload[file] for file in self._mine)

    def run(self, before: Mapping[str, Entry]) -> None:
        """Write everything that is this process's and not yet done; it is on disk on return.

        Args:
            before: what earlier runs have done, from their journals.
        """
        begun = {file for entry in before.values() for file in entry.files}
        for file in sorted(self._mine):
            self._slots[file] = self._create(file, file in begun)
        with (
            Journal(self._staged, self._crew.rank) as journal,
            _Settler(self._staged, journal) as settler,
            ThreadPoolExecutor(THREADS, "convert") as pool,
        ):
            running: list[Future[None]] = []
            for name in self._target.infos:
                if files := self._open_files(name, before):
                    cost = self._target.infos[name].nbytes
                    self._source.expect(name)
                    self._memory.take(cost)
                    running = [one for one in running if not one.done() or one.result()]
                    running.append(pool.submit(self._move, name, files, cost, settler))
            for one in running:
                one.result()

    def _create(self, file: str, is_begun: bool) -> Mapping[str, Slot]:
        """Make a file at its full size, with everything but tensors; what is in it already stays."""
        planned, path = self._target.layout(file), self._staged / file
        if is_begun and not (path.is_file() and path.stat().st_size == planned.size):
            raise ValueError(f"{path} is not as it was left: start over without --resume")
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as stream:
            stream.truncate(planned.size)
            planned.write(stream)
        return planned.slots

    def _open_files(self, name: str, before: Mapping[str, Entry]) -> set[str]:
        """The files of this process that a tensor is still missing in."""
        files = {part.file for part in self._target.parts(name)} & self._mine
        done = files & set(before[name].files) if name in before else set()
        self._done += sum(part.nbytes for part in self._target.parts(name) if part.file in done)
        return files - done

    def _move(self, name: str, files: set[str], cost: int, settler: _Settler) -> None:
        try:
            with self._pool.recycled():
                entry, written = self._write(name, files)
        finally:
            self._memory.give(cost)
        settler.add(entry, written)
        with self._lock:
            self._done += written
            self._progress(name, self._done, self._total)

    def _write(self, name: str, files: set[str]) -> tuple[Entry, int]:
        tensor, written = self._source.read(name), 0
        stored = cast(self._source.origin(name), tensor, self._target.infos[name].dtype)
        digest = checksum(stored)
        self._checker.check(name, tensor, digest if stored is tensor else None)
        for part, blocks in zip(self._target.parts(name), self._target.split(name, stored), strict=True):
            if part.file in files:
                self._put(part.file, part.slot, blocks)
                written += part.nbytes
        shape, dtype = tuple(stored.shape), dtype_name(stored.dtype)
        return Entry(name, dtype, shape, digest, nonfinite(stored), tuple(sorted(files))), written

    def _put(self, file: str, slot: str, blocks: Iterable[Tensor]) -> None:
        place, crc = self._slots[file][slot], 0
        start = place.start + place.hole.offset
        end = start
        with open(self._staged / file, "r+b", buffering=0) as stream:
            for data in map(data_of, blocks):
                pwrite(stream.fileno(), data, end)
                crc, end = crc32(data, crc), end + len(data)
            write_crc(stream, place.hole, place.start, crc)
        assert end - start == place.hole.nbytes, f"{slot} is not as planned"


class _Memory:
    """Lets tensors into work as long as they fit together."""

    def __init__(self, limit: int) -> None:
        self._free = self._limit = limit
        self._changed = threading.Condition()

    def take(self, nbytes: int) -> None:
        """Wait until there is room."""
        nbytes = min(nbytes, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes

    def give(self, nbytes: int) -> None:
        """Free what was taken."""
        with self._changed:
            self._free += min(nbytes, self._limit)
            self._changed.notify()


class _Settler:
    """Forces written files to disk and then notes their tensors in the journal, in a thread of its own."""

    def __init__(self, staged: Path, journal: Journal) -> None:
        self._staged, self._journal, self._lock = staged, journal, threading.Lock()
        self._entries: list[Entry] = []
        self._nbytes = 0
        self._futures: list[Future[None]] = []

    def __enter__(self) -> _Settler:
        self._pool = ThreadPoolExecutor(1, "settle")
        return self

    def add(self, entry: Entry, nbytes: int) -> None:
        """A tensor was written; from time to time, see to it that it lasts."""
        with self._lock:
            self._entries.append(entry)
            self._nbytes += nbytes
            if self._nbytes >= _SETTLE:
                self._submit()

    def _submit(self) -> None:
        self._futures = [one for one in self._futures if not one.done() or one.result()]
        self._futures.append(self._pool.submit(self._settle, self._entries))
        self._entries, self._nbytes = [], 0

    def _settle(self, entries: list[Entry]) -> None:
        for file in sorted({file for entry in entries for file in entry.files}):
            layout.sync(self._staged / file, forget=True)
        self._journal.add(entries)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._entries:
            self._submit()
        self._pool.shutdown()
        if kind is None:
            for future in self._futures:
                future.result()
