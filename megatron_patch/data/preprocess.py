"""Text to an indexed dataset, tokenized by several processes: `megatron-patch preprocess`.

    report = preprocess(PreprocessArgs(input=("corpus.jsonl",), output_prefix="corpus", tokenizer_model="model/"))

The parent reads records in batches, sends each to a worker and writes the answers in order, so the output depends on
the input alone. Only a few batches are under way at a time, whichever side is slower. Workers parse, clean and
tokenize; they import neither torch nor transformers when the tokenizer is a fast one. They also take the fingerprints
by which the parent, in order, tells duplicates. Any failure, a worker's death among them, ends the run with an error
and leaves no output.

Workers are started by "spawn": a script that calls `preprocess` needs an `if __name__ == "__main__"` guard.
It does not know the flags of training, nor models.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_patch.data.arguments import CleaningArgs, DedupArgs, PreprocessArgs
from megatron_patch.data.cleaning import STEPS, Cleaner
from megatron_patch.data.dedup import Deduplicator, Fingerprints, fingerprints
from megatron_patch.data.indexed import IndexedWriter, indexed_writer, token_dtype
from megatron_patch.data.manifest import write_manifest
from megatron_patch.data.readers import BadRecord, Record, expand_inputs, open_stream, read_records, record_text
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from megatron_patch.tokenizer.encoder import Encode, EncoderRecipe

_BATCH_BYTES = 1 << 20
_BATCHES_PER_WORKER = 3
_MESSAGES = 20
"""Skipped records that are reported one by one; the rest are only counted."""
EMPTY = "empty text"


@dataclass(frozen=True)
class PreprocessReport:
    """What a run did."""

    prefix: str
    """The dataset's prefix, for --data-path of `pretrain`."""
    documents: int
    """Documents written."""
    tokens: int
    """Tokens written, end-of-document tokens included."""
    skipped: tuple[tuple[str, int], ...]
    """Reason and number of the records that were left out, the most frequent reason first."""
    changed: tuple[tuple[str, int], ...]
    """Cleaning step and number of the documents that it changed, in the order of the steps."""
    input_bytes: int
    """Size of the input files on disk."""
    output_bytes: int
    """Size of the .bin and .idx files."""
    dtype: str
    """Type of a stored token id."""
    seconds: float
    """Wall time, start-up included."""
    notes: tuple[str, ...]
    """What the user should know about this dataset."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens written per second of wall time."""
        return self.tokens / self.seconds


def preprocess(args: PreprocessArgs) -> PreprocessReport:
    """Tokenizes the input files into one dataset.

    Raises ValueError for what a user can mend (a broken line under --on-error stop, a truncated file, an empty
    dataset), ChildProcessError if a worker died, RuntimeError if it failed. Nothing is left behind then.
    """
    start = time.perf_counter()
    args.validate()
    files = expand_inputs(args.input)
    tokenizer = load_tokenizer(args.tokenizer_model, args.trust_remote_code)
    job = _job(args, tokenizer)
    deduplicator = Deduplicator(args.deduplication)
    with indexed_writer(args.dataset_prefix, job.dtype) as writer, _Progress(files, args) as progress:
        for batch, result in _tokenized(_read_batches(files, args.txt_document), job, args.workers):
            _take(result, writer, progress, args.on_error, deduplicator)
            progress.advance(batch.disk_bytes)
        _require_documents(progress, args)
    write_manifest(args.dataset_prefix, tokenizer, append_eod=args.append_eod, max_id=None)
    return PreprocessReport(
        prefix=args.dataset_prefix,
        documents=progress.documents,
        tokens=progress.tokens,
        skipped=tuple(progress.skipped.most_common()),
        changed=tuple((step, progress.changed[step]) for step in STEPS if progress.changed[step]),
        input_bytes=progress.total_bytes,
        output_bytes=sum(os.path.getsize(f"{args.dataset_prefix}{suffix}") for suffix in (".bin", ".idx")),
        dtype=job.dtype.name,
        seconds=time.perf_counter() - start,
        notes=_notes(args, tokenizer),
    )


def _job(args: PreprocessArgs, tokenizer: Tokenizer) -> _Job:
    if args.append_eod and tokenizer.eod is None:
        raise ValueError(f"--append-eod: the tokenizer in {tokenizer.directory!r} has no end-of-sequence token")
    eod = tokenizer.eod if args.append_eod else None
    dtype = token_dtype(tokenizer.vocab_size)
    return _Job(tokenizer.encoder_recipe(), args.json_keys, eod, dtype, args.cleaning, args.deduplication)


def _take(
    result: _Result, writer: IndexedWriter, progress: _Progress, on_error: str, deduplicator: Deduplicator
) -> None:
    if result.errors and on_error == "stop":
        raise ValueError(f"{result.errors[0]} (--on-error skip goes on without such lines)")
    if result.prints is not None:
        result = _without_duplicates(result, deduplicator.judge(result.prints))
    progress.count(result)
    writer.add(result.tokens, result.lengths)


def _without_duplicates(result: _Result, reasons: list[str | None]) -> _Result:
    """The result without the documents that there is a reason to leave out."""
    is_new = np.array([reason is None for reason in reasons], bool)
    tokens = result.tokens[np.repeat(is_new, result.lengths)]
    skipped = result.skipped + Counter(reason for reason in reasons if reason is not None)
    return result._replace(tokens=tokens, lengths=result.lengths[is_new], skipped=skipped)


def _require_documents(progress: _Progress, args: PreprocessArgs) -> None:
    if progress.documents == 0:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in progress.skipped.most_common())
        raise ValueError(
            f"no document in {', '.join(args.input)} ({reasons or 'the files are empty'}): nothing written"
        )


def _notes(args: PreprocessArgs, tokenizer: Tokenizer) -> tuple[str, ...]:
    notes = []
    if not args.append_eod:
        notes.append("no end-of-document tokens: training joins documents unmarked; --append-eod puts them in")
    if 65500 <= tokenizer.vocab_size <= 65536:
        notes.append(
            f"vocabulary {tokenizer.vocab_size} is stored as int32; megatron-core's fast_cache_load would read uint16"
        )
    return tuple(notes)


# -------------------------------------------------------------------------------------------------------------- batches


class _Batch(NamedTuple):
    """Records that one worker handles at a time."""

    records: list[Record]
    disk_bytes: int
    """Bytes of the input files that were read for it (compressed, if they are)."""


def _read_batches(files: tuple[Path, ...], txt_document: str) -> Iterator[_Batch]:
    """Batches of about _BATCH_BYTES, across files: many tiny files share one."""
    records: list[Record] = []
    size = disk_bytes = 0
    for path in files:
        with open(path, "rb") as raw, open_stream(raw, path) as stream:
            before = 0
            for record in read_records(path, stream, txt_document):
                records.append(record)
                size += len(record.data)
                if size >= _BATCH_BYTES:
                    position = raw.tell()
                    yield _Batch(records, disk_bytes + position - before)
                    records, size, disk_bytes, before = [], 0, 0, position
            disk_bytes += raw.tell() - before
    if records:
        yield _Batch(records, disk_bytes)


def _tokenized(batches: Iterator[_Batch], job: _Job, workers: int) -> Iterator[tuple[_Batch, _Result]]:
    """Every batch with its result, in order, with a bounded number of batches under way."""
    pending: deque[tuple[_Batch, Future[_Result]]] = deque()
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job,))
    try:
        for batch in batches:
            pending.append((batch, _submit(pool, batch)))
            if len(pending) >= workers * _BATCHES_PER_WORKER:
                yield _oldest(pending)
        while pending:
            yield _oldest(pending)
    except ChildProcessError:
        # The pool ends its workers itself, but waits for ever for one that it was starting when another died.
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, batch: _Batch) -> Future[_Result]:
    try:
        return pool.submit(_work, batch.records)
    except BrokenProcessPool as error:
        # Carried by a future, so that the error surfaces at the batch whose turn it is, not at this later one.
        future: Future[_Result] = Future()
        future.set_exception(error)
        return future


def _oldest(pending: deque[tuple[_Batch, Future[_Result]]]) -> tuple[_Batch, _Result]:
    batch, future = pending.popleft()
    try:
        return batch, future.result()
    except BrokenProcessPool as error:
        why = "a worker process died (killed, out of memory, or unable to start; see above)"
        raise ChildProcessError(f"{why} at or after {batch.records[0].place}") from error
    except Exception as error:
        span = f"{batch.records[0].place} .. {batch.records[-1].place}"
        raise RuntimeError(f"a worker failed within {span}: {type(error).__name__}: {error}") from error


# -------------------------------------------------------------------------------------------------------------- workers


@dataclass(frozen=True)
class _Job:
    """What a worker must know."""

    recipe: EncoderRecipe
    key: str
    eod: int | None
    dtype: np.dtype
    cleaning: CleaningArgs
    dedup: DedupArgs


class _Result(NamedTuple):
    """A tokenized batch."""

    tokens: np.ndarray
    lengths: np.ndarray
    skipped: Counter[str]
    changed: Counter[str]
    """Documents that each cleaning step changed, those that a later one dropped included."""
    errors: list[str]
    """Messages of records that are no documents, the first few of the batch."""
    prints: Fingerprints | None
    """The documents' fingerprints, where duplicates are to be left out."""


class _Worker(NamedTuple):
    job: _Job
    encode: Encode
    cleaner: Cleaner


_worker: _Worker | None = None


def _start_worker(job: _Job) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The processes share the cores already; threads inside each would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = _Worker(job, job.recipe.build(), Cleaner(job.cleaning))


def _end_with_parent() -> None:
    """A worker of a killed parent would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(records: list[Record]) -> _Result:
    assert _worker is not None
    job, encode, cleaner = _worker
    texts, skipped, errors = _texts(records, job.key)
    texts = [text for text in map(cleaner.clean, texts) if text is not None]
    changed, dropped = cleaner.take_counts()
    documents = [_end(np.array(ids, job.dtype), job.eod) for ids in encode(texts)] if texts else []
    kept = [document for document in documents if document.size]
    skipped[EMPTY] += len(documents) - len(kept)
    skipped.update({f"cleaning: {step}": count for step, count in dropped.items()})
    tokens = np.concatenate([np.empty(0, job.dtype), *kept])
    lengths = np.array([document.size for document in kept], np.int32)
    prints = None
    if job.dedup.dedup != "none":
        with_tokens = [text for text, document in zip(texts, documents, strict=True) if document.size]
        prints = fingerprints(with_tokens, job.dedup)
    return _Result(tokens, lengths, +skipped, changed, errors[:_MESSAGES], prints)


def _texts(records: list[Record], key: str) -> tuple[list[str], Counter[str], list[str]]:
    """The documents among the records, why others are none, and a message about each of those that is an error."""
    texts, skipped, errors = [], Counter(), []
    for record in records:
        try:
            text = record_text(record, key)
        except BadRecord as error:
            skipped[error.reason] += 1
            errors.append(str(error))
            continue
        if text.strip():
            texts.append(text)
        else:
            skipped[EMPTY] += 1
    return texts, skipped, errors


def _end(document: np.ndarray, eod: int | None) -> np.ndarray:
    """Appends the end-of-document token, unless the tokenizer itself has."""
    if eod is None or document.size == 0 or document[-1] == eod:
        return document
    return np.append(document, document.dtype.type(eod))


# ------------------------------------------------------------------------------------------------------------- progress


class _Progress:
    """Counts, and tells the user: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, files: tuple[Path, ...], args: PreprocessArgs) -> None:
        self.total_bytes = sum(os.path.getsize(path) for path in files)
        self.documents = self.tokens = self.messages = 0
        self.skipped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self._interval = args.log_interval
        self._start = time.perf_counter()
        self._done = 0
        self._bar = tqdm(
            total=self.total_bytes, unit="B", unit_scale=True, desc="preprocess", disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def count(self, result: _Result) -> None:
        """Adds up a result and reports the records it left out."""
        before = self.documents
        self.documents += len(result.lengths)
        self.tokens += result.tokens.size
        self.skipped += result.skipped
        self.changed += result.changed
        for message in result.errors[: max(0, _MESSAGES - self.messages)]:
            self.messages += 1
            tail = "; further lines like it are only counted" if self.messages == _MESSAGES else ""
            self._bar.write(f"skipped {message}{tail}", file=sys.stderr)
        if self._bar.disable and before // self._interval < self.documents // self._interval:
            print(self._line(), file=sys.stderr, flush=True)

    def advance(self, disk_bytes: int) -> None:
        """Moves on by a number of bytes of the input files."""
        self._done += disk_bytes
        self._bar.update(disk_bytes)
        self._bar.set_postfix(docs=self.documents, tokens=self.tokens, skipped=self.skipped.total(), refresh=False)

    def _line(self) -> str:
        seconds = time.perf_counter() - self._start
        share = 100 * self._done / max(1, self.total_bytes)
        counts = f"{self.documents} documents, {self.tokens} tokens, {self.skipped.total()} skipped"
        return f"preprocess: {share:.0f} % of the input, {counts}, {self.tokens / seconds:.0f} tokens/s"
