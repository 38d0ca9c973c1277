"""One shard of text tokenized into files, by a worker process.

    start_worker(job, counters)                # once a process
    report = tokenize_shard(shard)             # 000017-0.bin, 000017-0.len, ... and, last of all, 000017.json

Nothing of a shard goes back to the parent but a report of a few hundred bytes, so that no queue can grow, and what a
killed run had finished is still there: a shard is finished once its .json is. A worker imports neither torch nor
transformers when the tokenizer is a fast one.

It does not know other shards, nor what becomes of duplicates: it only takes their fingerprints.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from ctypes import Array
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_patch.data.arguments import CleaningArgs, DedupArgs
from megatron_patch.data.cleaning import Cleaner
from megatron_patch.data.dedup import Fingerprints, fingerprints
from megatron_patch.data.indexed import replacing, sync
from megatron_patch.data.readers import BadRecord, Record, place, record_text
from megatron_patch.data.shards import Shard, ShardReader
from megatron_patch.tokenizer import engines
from megatron_patch.tokenizer.engines import ONE_THREAD, Encoded, Engine, EngineRecipe

BATCH_CHARACTERS = 1 << 18
"""Text that goes to the tokenizer at a time."""
_TOLD_BYTES = 1 << 18
"""Input that is read between two times that the parent is told."""
MESSAGES = 20
"""Bad records of a shard that are told one by one; the rest are only counted."""
EMPTY = "empty text"
_QUOTED = 1 << 20
"""Bytes of a bad record that go into quarantine; the rest is still in the input."""


@dataclass(frozen=True)
class Job:
    """What a worker must know."""

    recipe: EngineRecipe
    keys: tuple[str, ...]
    layout: str
    txt_document: str
    eod: int | None
    """What to end every document with."""
    max_doc_tokens: int | None
    dtype: np.dtype
    cleaning: CleaningArgs
    dedup: DedupArgs
    on_error: str
    directory: str
    """Where the files of shards go."""


@dataclass(frozen=True)
class Bad:
    """A record that is no document; `line` counts from the first of its piece."""

    path: str
    line: int
    unit: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{place(self.path, self.line, self.unit)}: {self.reason}{self.detail and f': {self.detail}'}"


@dataclass
class KeyReport:
    """What became of the texts of one key."""

    documents: int = 0
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)


@dataclass
class ShardReport:
    """What became of a shard."""

    number: int
    records: int = 0
    lines: list[tuple[str, int]] = field(default_factory=list)
    """Lines of each part of a file, where others number theirs on from it."""
    bad: Counter[str] = field(default_factory=Counter)
    """Reason and number of the records that are no document, counted once for each key."""
    messages: list[Bad] = field(default_factory=list)
    """The first of them."""
    keys: list[KeyReport] = field(default_factory=list)

    @staticmethod
    def from_json(values: dict[str, Any]) -> ShardReport:
        """What `json.dumps(report, default=vars)` wrote."""
        keys = [
            KeyReport(key["documents"], key["tokens"], Counter(key["skipped"]), Counter(key["changed"]))
            for key in values["keys"]
        ]
        lines = [(path, count) for path, count in values["lines"]]
        return ShardReport(
            **{
                **values,
                "keys": keys,
                "lines": lines,
                "bad": Counter(values["bad"]),
                "messages": [Bad(**message) for message in values["messages"]],
            }
        )


def key_file(directory: str | Path, number: int, index: int, kind: str) -> Path:
    """A file of one key of a shard: `bin` tokens, `len` int32 lengths, `npz` fingerprints."""
    return Path(directory) / f"{number:06d}-{index}.{kind}"


def report_file(directory: str | Path, number: int) -> Path:
    """The file that makes a shard a finished one."""
    return Path(directory) / f"{number:06d}.json"


def quarantine_file(directory: str | Path, number: int) -> Path:
    """Bad records of a shard."""
    return Path(directory) / f"{number:06d}.bad"


# --------------------------------------------------------------------------------------------------------- one process


@dataclass(frozen=True)
class _Worker:
    job: Job
    engine: Engine
    cleaner: Cleaner
    counters: Array[Any]
    """Bytes read, documents and tokens so far, of all workers together."""

    def advance(self, *amounts: int) -> None:
        advance(self.counters, *amounts)


_worker: _Worker | None = None


def start_worker(job: Job, counters: Array[Any]) -> None:
    """Prepares this process for `tokenize_shard`."""
    global _worker
    _worker = _Worker(job, _engine(job.recipe), Cleaner(job.cleaning), counters)


@lru_cache(maxsize=1)
def _engine(recipe: EngineRecipe) -> Engine:
    return recipe.build()


def fault(recipe: EngineRecipe, texts: list[str], expected: Encoded) -> str | None:
    """See engines.fault; this process keeps the engine."""
    return engines.fault(recipe, texts, expected, _engine)


def advance(counters: Array[Any], *amounts: int) -> None:
    """Adds to the counters that all workers share: bytes read, documents, tokens."""
    with counters.get_lock():  # type: ignore[attr-defined]  # a multiprocessing.Array
        for index, amount in enumerate(amounts):
            counters[index] += amount


def settle() -> None:
    """Makes this process one that ends with its parent, leaves Ctrl-C to it and the other cores to other processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The processes share the cores already; threads inside each would only compete.
    os.environ.update(ONE_THREAD)


def _end_with_parent() -> None:
    """A worker of a killed parent would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def tokenize_shard(shard: Shard) -> ShardReport:
    """Writes the files of a shard. Raises OSError if they cannot be written, DamagedInput if the input breaks off."""
    assert _worker is not None
    job, reader = _worker.job, ShardReader(shard, _worker.job.txt_document)
    report = ShardReport(shard.number)
    writers = [_KeyWriter(_worker, shard.number, index) for index in range(len(job.keys))]
    read = 0
    with open(quarantine_file(job.directory, shard.number), "wb") as quarantine:
        for record in reader:
            report.records += 1
            for key, writer in zip(job.keys, writers, strict=True):
                _take(record, key, writer, report, quarantine)
            if report.bad and job.on_error == "stop":
                return report
            if reader.position - read >= _TOLD_BYTES:
                _worker.advance(reader.position - read)
                read = reader.position
        if report.bad:
            sync(quarantine)
    report.keys = [writer.close() for writer in writers]
    parts = zip(shard.pieces, reader.lines, strict=True)
    report.lines = [(piece.path, lines) for piece, lines in parts if lines]
    finish(job.directory, report)
    _worker.advance(shard.disk_bytes - read)
    return report


def _take(record: Record, key: str, writer: _KeyWriter, report: ShardReport, quarantine: IO[bytes]) -> None:
    assert _worker is not None
    try:
        writer.add(record_text(record, key, _worker.job.layout, writer.report.changed))
    except BadRecord as error:
        writer.report.skipped[error.reason] += 1
        note_bad(record, error, report, None if _worker.job.on_error == "stop" else quarantine)


def note_bad(record: Record, error: BadRecord, report: ShardReport, quarantine: IO[bytes] | None) -> None:
    """Counts a bad record, keeps what to say of it, and if asked for the record itself."""
    report.bad[error.reason] += 1
    bad = Bad(record.path, record.line, record.unit, error.reason, error.detail)
    if len(report.messages) < MESSAGES:
        report.messages.append(bad)
    if quarantine is not None:
        data = record.data or json.dumps(record.value, ensure_ascii=False, default=str).encode("utf-8", "replace")
        line = {**asdict(bad), "record": data[:_QUOTED].decode("utf-8", "backslashreplace"), "bytes": len(data)}
        quarantine.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def finish(directory: str, report: ShardReport) -> None:
    """Writes the file that makes a shard a finished one; all others must be on the disk."""
    with replacing(report_file(directory, report.number)) as file:
        file.write(json.dumps(report, default=vars).encode())


# ------------------------------------------------------------------------------------------------------------- one key


class _KeyWriter:
    """Takes the texts of one key of a shard, and writes their tokens."""

    def __init__(self, worker: _Worker, number: int, index: int) -> None:
        self._worker, self._job = worker, worker.job
        self._number, self._index = number, index
        self._file("bin").write_bytes(b"")
        self._lengths: list[np.ndarray] = []
        self._prints: list[Fingerprints] = []
        self._pieces: list[np.ndarray] = []
        self._texts: list[str] = []
        self._characters = 0
        self.report = KeyReport()

    def _file(self, kind: str) -> Path:
        return key_file(self._job.directory, self._number, self._index, kind)

    def add(self, text: str) -> None:
        """Takes one text."""
        if not text.strip():
            self.report.skipped[EMPTY] += 1
            return
        self._texts.append(text)
        self._characters += len(text)
        if self._characters >= BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        texts = [text for text in map(self._worker.cleaner.clean, self._texts) if text is not None]
        self._texts, self._characters = [], 0
        changed, dropped = self._worker.cleaner.take_counts()
        self.report.changed += changed
        self.report.skipped.update({f"cleaning: {step}": count for step, count in dropped.items()})
        if not texts:
            return
        ids, lengths, pieces = self._tokens(texts)
        self.report.skipped[EMPTY] += int((pieces == 0).sum())
        self.report.documents += len(lengths)
        self.report.tokens += ids.size
        with open(self._file("bin"), "ab") as file:
            file.write(ids.tobytes())
        self._lengths.append(lengths)
        if self._job.dedup.dedup != "none":
            kept = [text for text, count in zip(texts, pieces.tolist(), strict=True) if count]
            self._prints.append(fingerprints(kept, self._job.dedup))
            self._pieces.append(pieces[pieces > 0])
        self._worker.advance(0, len(lengths), ids.size)

    def _tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, length of every document, number of documents that each text makes: none, one, or several)."""
        job = self._job
        ids, lengths = self._worker.engine.encode_batch(texts)
        largest, most = int(ids.max(initial=0)), int(np.iinfo(job.dtype).max)
        if largest > most:
            raise OverflowError(f"token id {largest} does not fit {job.dtype}, whose largest is {most}")
        return shape_documents(ids.astype(job.dtype), lengths, job.eod, job.max_doc_tokens)

    def close(self) -> KeyReport:
        """Writes what is left; returns what became of all texts."""
        self._flush()
        with open(self._file("bin"), "ab") as file:
            sync(file)
        with open(self._file("len"), "wb") as file:
            file.write(np.concatenate([np.empty(0, np.int32), *self._lengths]).tobytes())
            sync(file)
        if self._prints:
            with open(self._file("npz"), "wb") as file:
                names = (*Fingerprints._fields, "pieces")
                columns = zip(*(*self._prints,), strict=True)
                arrays = [*map(np.concatenate, columns), np.concatenate(self._pieces)]
                np.savez(file, **dict(zip(names, arrays, strict=True)))
                sync(file)
        self.report.skipped, self.report.changed = +self.report.skipped, +self.report.changed
        return self.report


def shape_documents(
    ids: np.ndarray, lengths: np.ndarray, eod: int | None, most: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts what is longer than `most` into several documents and ends each with `eod`.

    Args:
        ids: of all texts, one after the other; lengths: of each text.

    Returns:
        ids; int32 length of every document, at most `most` with its end; number of documents that each text makes (0
        for a text without a token).
    """
    if eod is not None:  # a tokenizer may have put it there itself: it must not be there twice
        ends = np.cumsum(lengths)
        has_end = (lengths > 0) & (ids[np.maximum(ends, 1) - 1] == eod) if ids.size else np.zeros(len(lengths), bool)
        ids = np.delete(ids, ends[has_end] - 1) if has_end.any() else ids
        is_text, lengths = lengths > 0, lengths - has_end
    else:
        is_text = lengths > 0
    room = max(1, int(lengths.max(initial=0))) if most is None else most - (eod is not None)
    pieces = np.where(is_text, np.maximum(1, -(-lengths // room)), 0)
    sizes = np.full(int(pieces.sum()), room, np.int64)
    last = np.cumsum(pieces)[is_text] - 1
    sizes[last] = (lengths - (pieces - 1) * room)[is_text]
    if eod is not None:
        ids = np.insert(ids, np.cumsum(sizes), eod)
        sizes += 1
    return ids, sizes.astype(np.int32), pieces
