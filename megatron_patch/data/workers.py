"""The worker processes of `preprocess`: shards in, reports out, and no way for one to get lost.

Any failure ends the run with an error: a worker that was killed, one that failed, a full disk. It does not know what a
worker does with a shard.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_patch.data.ledger import Ledger
from megatron_patch.data.partial import PartialRun
from megatron_patch.data.shards import Shard
from megatron_patch.data.tokenizing import ShardReport, advance, start_worker, tokenize_shard
from megatron_patch.tokenizer.engines import EngineMismatch

_UNDER_WAY = 2
"""Shards per worker that are handed out: the one it works on and the next."""
_POLL_SECONDS = 0.5


Start = Callable[[Any, Any], None]
"""Prepares a process, with the job and the counters of bytes, documents and tokens."""
Work = Callable[[Shard], ShardReport]
"""What a prepared process does with a shard."""


def tokenize(
    shards: Iterable[Shard],
    job: Any,
    workers: int,
    partial: PartialRun,
    ledger: Ledger,
    start: Start = start_worker,
    work: Work = tokenize_shard,
) -> None:
    """Tokenizes the shards that an earlier run has not; the ledger takes every report in the order of the shards.

    Args:
        job: what `start` is to know.

    Raises what the ledger raises, OSError, ChildProcessError if a worker died, RuntimeError if it failed.
    """
    crew = _Crew(job, workers, ledger, start, work)
    try:
        for shard in shards:
            report = partial.finished(shard.number)
            if report is None:
                crew.submit(shard)
            else:
                crew.adopt(shard, report)
        crew.finish()
    finally:
        crew.dismiss()


class _Crew:
    """Worker processes, and the shards that they have."""

    def __init__(self, job: Any, workers: int, ledger: Ledger, start: Start, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self._others = set(multiprocessing.active_children())
        self._counters: Any = context.Array("q", 3)
        self._pool = ProcessPoolExecutor(workers, context, start, (job, self._counters))
        self._work = work
        self._most, self._ledger = workers * _UNDER_WAY, ledger
        self._under_way: dict[Future[ShardReport], Shard] = {}
        self._ready: dict[int, ShardReport] = {}
        self._next = 0

    def submit(self, shard: Shard) -> None:
        """Hands out a shard, once there is room for it."""
        while len(self._under_way) >= self._most:
            self._collect()
        try:
            self._under_way[self._pool.submit(self._work, shard)] = shard
        except BrokenProcessPool as error:
            raise self._death() from error

    def adopt(self, shard: Shard, report: ShardReport) -> None:
        """Takes a shard that was finished before."""
        self._ledger.resumed += 1
        documents, tokens = (sum(getattr(key, name) for key in report.keys) for name in ("documents", "tokens"))
        advance(self._counters, shard.disk_bytes, documents, tokens)
        self._take(report)

    def finish(self) -> None:
        """Waits for all that is under way."""
        while self._under_way:
            self._collect()

    def dismiss(self) -> None:
        """Ends the processes. What they have not finished is not missed: nothing was said of it."""
        for process in set(multiprocessing.active_children()) - self._others:
            # At the end of a run they have nothing to do; at the end of a failed one, nothing that matters.
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _collect(self) -> None:
        done, _ = wait(self._under_way, _POLL_SECONDS, FIRST_COMPLETED)
        for future in sorted(done, key=lambda future: self._under_way[future].number):
            self._take(self._result(future))
            del self._under_way[future]
        self._ledger.show(*self._counters.get_obj())  # without its lock, which a killed worker may hold

    def _result(self, future: Future[ShardReport]) -> ShardReport:
        where = _where(self._under_way[future])
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise self._death() from error
        except (EngineMismatch, OSError, ValueError):
            raise
        except Exception as error:
            raise RuntimeError(f"a worker failed within {where}: {type(error).__name__}: {error}") from error

    def _death(self) -> ChildProcessError:
        shards = sorted(self._under_way.values(), key=lambda shard: shard.number)
        where = _where(shards[0]) if shards else "its start"
        return ChildProcessError(
            f"a worker process died (killed, out of memory, or unable to start; see above) at or after {where}; what "
            "is finished is kept: run the same command again to go on"
        )

    def _take(self, report: ShardReport) -> None:
        self._ready[report.number] = report
        while self._next in self._ready:
            self._ledger.take(self._ready.pop(self._next))
            self._next += 1


def _where(shard: Shard) -> str:
    first, last = shard.pieces[0], shard.pieces[-1]
    start = f"{first.path}, byte {first.start}" if first.start else first.path
    return start if first.path == last.path else f"{start} .. {last.path}"
