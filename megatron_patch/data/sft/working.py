"""One shard of conversations made samples, by a worker process: what tokenizing.py is for text.

    start_worker(job, counters)                # once a process
    report = render_shard(shard)               # 000017-0.bin, .len and .mask, and last of all 000017.json

It does not know other shards or packs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from ctypes import Array
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_patch.data.indexed import sync
from megatron_patch.data.readers import BadRecord, Record
from megatron_patch.data.sft.conversations import NOTHING_LEARNED, Conversation, read_conversation
from megatron_patch.data.sft.rendering import Renderer, RendererRecipe
from megatron_patch.data.sft.samples import Sample
from megatron_patch.data.sft.templates import Unusable
from megatron_patch.data.shards import Shard, ShardReader
from megatron_patch.data.tokenizing import (
    KeyReport,
    ShardReport,
    advance,
    finish,
    key_file,
    note_bad,
    quarantine_file,
)

SUPERVISED = "tokens to be learned"
"""Beside what a renderer counts."""
_BATCH = 256
"""Conversations that go to the tokenizer at a time."""
SKIPPED = frozenset(
    (NOTHING_LEARNED, "nothing to learn", "nothing to learn within --seq-length", "longer than --seq-length")
)
"""Reasons that are nobody's mistake: such records are counted, and do not stop a run."""


@dataclass(frozen=True)
class SftJob:
    """What a worker must know."""

    recipe: RendererRecipe
    layouts: Mapping[str, str]
    """File -> what its records are."""
    columns: Mapping[str, str]
    on_error: str
    directory: str
    """Where the files of shards go."""


@dataclass(frozen=True)
class _Worker:
    job: SftJob
    renderer: Renderer
    counters: Array[Any]
    """Bytes read, samples and tokens so far, of all workers together."""

    def advance(self, *amounts: int) -> None:
        advance(self.counters, *amounts)


_worker: _Worker | None = None


def start_worker(job: SftJob, counters: Array[Any]) -> None:
    """Prepares this process for `render_shard`."""
    global _worker
    _worker = _Worker(job, job.recipe.build(), counters)


def mask_file(directory: str | Path, number: int) -> Path:
    """A uint8 for each token of a shard."""
    return key_file(directory, number, 0, "mask")


def render_shard(shard: Shard) -> ShardReport:
    """Writes the files of a shard. Raises OSError if they cannot be written, DamagedInput if the input breaks off."""
    assert _worker is not None
    job, reader = _worker.job, ShardReader(shard, "file")
    report, kept = ShardReport(shard.number), KeyReport()
    _worker.renderer.counts.clear()
    read = 0
    with ExitStack() as stack:
        paths = (quarantine_file(job.directory, shard.number), *_token_files(job.directory, shard.number))
        quarantine, *files = (stack.enter_context(open(path, "wb")) for path in paths)
        writer = _ShardWriter(*files)
        for records in _batches(reader):
            report.records += len(records)
            samples, tokens = kept.documents, kept.tokens
            for record, outcome in _outcomes(records, job, _worker.renderer):
                _take(record, outcome, writer, report, kept, None if job.on_error == "stop" else quarantine)
            if report.bad and job.on_error == "stop":
                return report
            _worker.advance(reader.position - read, kept.documents - samples, kept.tokens - tokens)
            read = reader.position
        writer.close()
        sync(quarantine)
    kept.changed += _worker.renderer.counts
    kept.skipped, kept.changed, report.keys = +kept.skipped, +kept.changed, [kept]
    report.lines = [(piece.path, lines) for piece, lines in zip(shard.pieces, reader.lines, strict=True) if lines]
    finish(job.directory, report)
    _worker.advance(shard.disk_bytes - read)
    return report


def _token_files(directory: str, number: int) -> tuple[Path, Path, Path]:
    """Ids, masks and lengths of a shard."""
    return key_file(directory, number, 0, "bin"), mask_file(directory, number), key_file(directory, number, 0, "len")


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    left = iter(records)
    while batch := list(islice(left, _BATCH)):
        yield batch


def _outcomes(
    records: Iterable[Record], job: SftJob, renderer: Renderer
) -> Iterator[tuple[Record, Sample | BadRecord]]:
    """For each record its sample, or why it makes none."""
    found = [(record, _conversation(record, job)) for record in records]
    made = iter(renderer.samples(one for _, one in found if isinstance(one, Conversation)))
    for record, one in found:
        outcome = next(made) if isinstance(one, Conversation) else one
        yield record, BadRecord(record, outcome.reason, outcome.detail) if isinstance(outcome, Unusable) else outcome


def _conversation(record: Record, job: SftJob) -> Conversation | BadRecord:
    try:
        return read_conversation(record, job.layouts[record.path], job.columns)
    except BadRecord as error:
        return error


def _take(
    record: Record,
    outcome: Sample | BadRecord,
    writer: _ShardWriter,
    report: ShardReport,
    kept: KeyReport,
    quarantine: IO[bytes] | None,
) -> None:
    if isinstance(outcome, Sample):
        writer.add(outcome)
        kept.documents += 1
        kept.tokens += len(outcome.ids)
        kept.changed[SUPERVISED] += outcome.supervised
        return
    kept.skipped[outcome.reason] += 1
    if outcome.reason not in SKIPPED:
        note_bad(record, outcome, report, quarantine)


class _ShardWriter:
    """Writes samples of a shard as they come."""

    def __init__(self, ids: IO[bytes], mask: IO[bytes], lengths: IO[bytes]) -> None:
        self._ids, self._mask, self._lengths_file = ids, mask, lengths
        self._lengths: list[int] = []

    def add(self, sample: Sample) -> None:
        """Takes one sample."""
        self._ids.write(sample.ids.tobytes())
        self._mask.write(sample.mask.tobytes())
        self._lengths.append(len(sample.ids))

    def close(self) -> None:
        """Puts everything on the disk."""
        self._lengths_file.write(np.array(self._lengths, np.int32).tobytes())
        for file in (self._ids, self._mask, self._lengths_file):
            sync(file)
