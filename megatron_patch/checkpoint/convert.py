"""Any checkpoint to any other, tensor by tensor: Hugging Face, Megatron torch_dist, Megatron legacy, any layout.

    convert("path/to/hf", "path/to/megatron")        and back:        convert("path/to/megatron", "path/to/hf")

A `Source` reads internal tensors, a `Target` says which bytes of which file each becomes; this engine moves them, a few
at a time, in threads and over processes. Everything (names, shapes, files, config fields) is checked before anything is
written, and the target appears whole or not at all. It knows no arguments and no training.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32
from torch import Tensor

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint.archive import pwrite, write_crc
from megatron_patch.checkpoint.crew import Crew, assembled
from megatron_patch.checkpoint.formats import Slot, Source, Target
from megatron_patch.checkpoint.hf_format import HFSource, HFTarget, cast
from megatron_patch.checkpoint.huggingface import ORIGIN, save_origin
from megatron_patch.checkpoint.manifest import (
    Checker,
    Entry,
    Journal,
    checksum,
    converted,
    data_of,
    dtype_name,
    journaled,
    nonfinite,
    read_manifest,
    remove_journals,
    versions,
    write_manifest,
)
from megatron_patch.checkpoint.opening import Wanted, open_source, open_target
from megatron_patch.checkpoint.recycling import Pool
from megatron_patch.checkpoint.whole import without_garbage_collection

Progress = Callable[[str, int, int], None]
"""Called after each tensor with its name, the bytes done and the bytes in all."""

THREADS = 2
MEMORY = 2**29
"""Bytes of tensors that may be in work at a time; a tensor that alone needs more is worked on alone."""

_SETTLE = 2**28
"""After so many bytes, what was written is forced to disk and noted in the journal."""


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    source: str
    target: str
    source_kind: str
    target_kind: str
    family: str
    tensors: int
    """Hugging Face tensors that the model has."""

    parameters: int
    nbytes: int
    """Bytes of tensors in the target's files."""

    dtypes: Mapping[str, int]
    """Dtype of the result -> number of internal tensors."""

    casts: Mapping[str, int]
    """Such as "float32 -> bfloat16" -> number of internal tensors that were cast so because it was asked for."""

    nonfinite: Mapping[str, int]
    """Tensor -> how many of its values are NaN or infinite."""

    ignored: tuple[str, ...]
    """Tensors of the source that are no parameters and were left out."""

    resumed: int
    """Tensors that an earlier, killed run had done."""

    seconds: float


@dataclass(frozen=True)
class Plan:
    """One conversion, checked, before anything is read or written."""

    source: Source
    target: Target
    wanted: Wanted

    @property
    def nbytes(self) -> int:
        """Bytes of tensors in the target."""
        return sum(self.target.payload.values())

    def summary(self) -> dict[str, Any]:
        """What identifies it, as JSON: for the manifest, and to know on --resume that it is the same."""
        return {
            "source": str(self.source.path.resolve()),
            "source_kind": self.source.kind,
            "source_files": self.source.identity(),
            "config": layout.read_config(self.source.config_folder),
            "target_kind": self.target.kind,
            "family": self.source.model.architecture.family.name,
            "options": {name: str(value) for name, value in asdict(self.wanted).items() if value is not None},
            "versions": versions(),
        }


def plan(
    source: str | Path,
    wanted: Wanted | None = None,
    *,
    hf_config: str | Path | None = None,
    trust_pickle: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Check a conversion and lay out its result; see `convert`. For a dry run the source needs no weights."""
    wanted = wanted or Wanted()
    with without_garbage_collection():
        opened = open_source(source, hf_config=hf_config, trust_pickle=trust_pickle, weightless=dry_run)
        return Plan(opened, open_target(opened, wanted), wanted)


def convert(
    source: str | Path,
    target: str | Path,
    wanted: Wanted | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    hf_config: str | Path | None = None,
    trust_pickle: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert a checkpoint; what the source is, is seen. Under torchrun, all its processes share the work.

    Args:
        source: a Hugging Face directory, or a Megatron checkpoint: its root, or the directory of one iteration.
        target: a directory that does not exist yet (or is empty).
        wanted: the format, layout and dtype to write; by default torch_dist from Hugging Face, else Hugging Face.
        overwrite: replace a target that is a checkpoint.
        resume: go on with a conversion that was killed.
        hf_config: directory with the config.json of a Megatron checkpoint that does not carry it.
        trust_pickle: read legacy checkpoints that need full unpickling, which can run any code.
        progress: told of each tensor.

    Raises:
        ValueError: anything about source or target that cannot be converted faithfully; nothing is left then.
        OSError: the disk is full or refuses; what was done is kept for `resume`.
    """
    source, target, start = Path(source), Path(target), time.perf_counter()
    _check_target(source, target, overwrite or resume)
    planned = plan(source, wanted, hf_config=hf_config, trust_pickle=trust_pickle)
    planned.source.check_convertible()
    summary = planned.summary()
    if resume and (done := _finished(target, planned, summary)):
        layout.clear_leftovers(target)
        return _report(planned, target, done, len(done), start)
    _check_space(target, planned)
    with assembled() as crew:
        entries, resumed = _run(planned, target, summary, crew, overwrite, resume, progress)
    return _report(planned, target, entries, resumed, start)


def _run(
    planned: Plan,
    target: Path,
    summary: Mapping[str, Any],
    crew: Crew,
    overwrite: bool,
    resume: bool,
    progress: Progress | None,
) -> tuple[dict[str, Entry], int]:
    """Do it, as one of a crew; the first process prepares and completes what the others share."""
    if crew.rank:
        crew.wait()
        _Mover(planned, layout.partial_of(target), crew, progress).run()
        crew.wait()
        crew.wait()
        return {}, 0
    with layout.resumable(target, summary, overwrite=overwrite, resume=resume) as staged:
        for folder in {(staged / file).parent for file in planned.target.payload}:
            folder.mkdir(parents=True, exist_ok=True)
        before = len(_done(staged))
        crew.wait()
        _Mover(planned, staged, crew, progress).run()
        crew.wait()
        entries = _done(staged)
        _complete(planned, staged, summary, entries)
    crew.wait()
    return entries, before


def _complete(planned: Plan, staged: Path, summary: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Everything but tensors; what makes it a checkpoint comes last."""
    parts = {name: {part.file for part in planned.target.parts(name)} for name in planned.target.infos}
    assert {name: set(entry.files) for name, entry in entries.items()} == parts, "some tensors were not converted"
    source, is_hf = planned.source, isinstance(planned.target, HFTarget)
    companions = staged if is_hf else layout.huggingface_directory(staged)
    layout.copy_side_files(source.config_folder, companions)
    if is_hf:
        (staged / ORIGIN).unlink(missing_ok=True)
    elif isinstance(source, HFSource):
        save_origin(companions, source.view().plan, source.hf_infos)
    planned.target.finish(staged)
    write_manifest(_weights(staged), summary, [entries[name] for name in parts])
    remove_journals(staged)
    if not is_hf:
        layout.write_tracker(staged, None)


def _done(staged: Path) -> dict[str, Entry]:
    """Internal name -> what has been done of it: by the journals, or by the manifest, which is there once all is."""
    return converted(_weights(staged)) or journaled(staged)


def _weights(target: Path) -> Path:
    """Where the weights of a target lie."""
    release = layout.iteration_directory(target, None)
    return release if release.is_dir() else target


# ------------------------------------------------------------------------------------------------- checks and reports


def _check_target(source: Path, target: Path, may_exist: bool) -> None:
    layout.refuse_existing(target, may_exist)
    if obstacle := next((one for one in target.absolute().parents if one.exists() and not one.is_dir()), None):
        raise ValueError(f"{target} cannot be made: {obstacle} is a file")
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(f"source {source} and target {target} must not contain one another")
    if not target.exists() or not any(target.iterdir()):
        return
    if not layout.is_megatron(target) and not layout.is_huggingface(target):
        raise ValueError(f"{target} is not empty and holds no checkpoint: --overwrite replaces checkpoints only")
    if iterations := sorted(path.name for path in target.glob("iter_*")):
        raise ValueError(f"{target} holds a training run ({iterations[-1]}): --overwrite does not replace those")


def _finished(target: Path, planned: Plan, summary: Mapping[str, Any]) -> dict[str, Entry]:
    """The tensors of a target that this very conversion has made already."""
    manifest = read_manifest(_weights(target)) if target.is_dir() else None
    is_whole = all((target / file).is_file() for file in planned.target.payload)
    return converted(_weights(target)) if manifest and manifest["plan"] == summary and is_whole else {}


def _check_space(target: Path, planned: Plan) -> None:
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    staged = layout.partial_of(target)
    there = sum(file.stat().st_blocks * 512 for file in staged.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free + there
    if planned.nbytes > free:
        raise ValueError(f"{target} needs {planned.nbytes / 1e9:.1f} GB; {folder} has {free / 1e9:.1f} GB free")


def _report(planned: Plan, target: Path, entries: Mapping[str, Entry], resumed: int, start: float) -> Report:
    source, infos = planned.source, planned.target.infos
    pairs = [(dtype_name(source.infos[name].dtype), dtype_name(info.dtype)) for name, info in infos.items()]
    asked = planned.wanted.dtype is not None
    return Report(
        source=str(source.path),
        target=str(target),
        source_kind=source.kind,
        target_kind=planned.target.kind,
        family=source.model.architecture.family.name,
        tensors=len(source.view().dtypes),
        parameters=sum(torch.Size(shape).numel() for shape in source.model.blueprint.shapes.values()),
        nbytes=planned.nbytes,
        dtypes=Counter(after for _, after in pairs),
        casts=Counter(f"{before} -> {after}" for before, after in pairs if asked and before != after),
        nonfinite={name: entry.nonfinite for name, entry in entries.items() if entry.nonfinite},
        ignored=source.ignored,
        resumed=resumed,
        seconds=time.perf_counter() - start,
    )


# ------------------------------------------------------------------------------------------------------ moving tensors


class _Mover:
    """Moves the tensors of one process's files, in threads."""

    def __init__(self, planned: Plan, staged: Path, crew: Crew, progress: Progress | None) -> None:
        self._source, self._target, self._staged, self._crew = planned.source, planned.target, staged, crew
        self._mine = crew.share(planned.target.payload)
        self._slots: dict[str, Mapping[str, Slot]] = {}
        self._checker = Checker(planned.source.weights_folder)
        self._pool, self._memory, self._progress = (
            Pool(MEMORY),
            _Memory(MEMORY),
            progress or (lambda name, done, total: None),
        )
        self._lock = threading.Lock()
        self._done, self._total = 0, sum(planned.target.payload[file] for file in self._mine)

    def run(self) -> None:
        """Write everything that is this process's and not yet in a journal; it is on disk on return."""
        before = _done(self._staged)
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
                    cost = 2 * self._target.infos[name].nbytes
                    self._memory.take(cost, running)
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
        for part, piece in zip(self._target.parts(name), self._target.split(name, stored), strict=True):
            if part.file in files:
                self._put(part.file, part.slot, piece)
                written += part.nbytes
        shape, dtype = tuple(stored.shape), dtype_name(stored.dtype)
        return Entry(name, dtype, shape, digest, nonfinite(stored), tuple(sorted(files))), written

    def _put(self, file: str, slot: str, piece: Tensor) -> None:
        place, data = self._slots[file][slot], data_of(piece)
        assert len(data) == place.hole.nbytes, f"{slot} is not as planned"
        with open(self._staged / file, "r+b", buffering=0) as stream:
            pwrite(stream.fileno(), data, place.start + place.hole.offset)
            if place.hole.checksums:
                write_crc(stream, place.hole, place.start, crc32(data))


class _Memory:
    """Lets tensors into work as long as they fit together."""

    def __init__(self, limit: int) -> None:
        self._free = self._limit = limit
        self._changed = threading.Condition()

    def take(self, nbytes: int, running: Iterable[Future[None]]) -> None:
        """Wait until there is room; raise what one of those in work raised."""
        nbytes = min(nbytes, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        for one in running:
            if one.done():
                one.result()

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
            layout.sync(self._staged / file)
        self._journal.add(entries)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._entries:
            self._submit()
        self._pool.shutdown()
        if kind is None:
            for future in self._futures:
                future.result()
