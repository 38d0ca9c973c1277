"""The worker processes of a run: shards in, reports out, and no way for one to get lost.

    with Crew(workers=8) as crew:
        recipe = choose(tokenizer, "auto", documents, crew.fault)      # an engine is proven where it will be used
        crew.tokenize(shards, job, partial, ledger)

Any failure ends the run with an error: a worker that was killed, one that failed, a full disk. Processes are started
when there is something for them to do. It does not know what a worker does with a shard.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_patch.data.ledger import Ledger
from megatron_patch.data.partial import PartialRun
from megatron_patch.data.shards import Shard
from megatron_patch.data.tokenizing import ShardReport, advance, fault, settle, start_worker, tokenize_shard
from megatron_patch.tokenizer.engines import Encoded, EngineMismatch, EngineRecipe

_UNDER_WAY = 2
"""Shards per worker that are handed out: the one it works on and the next."""
_POLL_SECONDS = 0.5
_JOB = "job.pickle"


Start = Callable[[Any, Any], None]
"""Prepares a process, with the job and the counters of bytes, documents and tokens."""
Work = Callable[[Shard], ShardReport]
"""What a prepared process does with a shard."""


class Crew:
    """The processes of one run. A context manager: at its end they are gone."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._others = set(multiprocessing.active_children())
        self._context = multiprocessing.get_context("spawn")
        self._counters: Any = self._context.Array("q", 3)
        self._pool = self._started()

    def _started(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._workers, self._context, _begin, (self._counters,))

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        """What they have not finished is not missed: nothing was said of it."""
        for process in set(multiprocessing.active_children()) - self._others:
            # At the end of a run they have nothing to do; at the end of a failed one, nothing that matters.
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def fault(self, recipe: EngineRecipe, texts: list[str], expected: Encoded) -> str | None:
        """What is wrong with an engine (see engines.fault), found by one process, which then has it for its work."""
        try:
            return self._pool.submit(fault, recipe, texts, expected).result()
        except BrokenProcessPool:
            self._pool = self._started()
            return "ends its process"

    def tokenize(
        self,
        shards: Iterable[Shard],
        job: Any,
        partial: PartialRun,
        ledger: Ledger,
        start: Start = start_worker,
        work: Work = tokenize_shard,
    ) -> None:
        """Tokenizes the shards that an earlier run has not; the ledger takes every report in the order of the shards.

        Args:
            job: what `start` is to know. A crew does one.

        Raises what the ledger raises, OSError, ChildProcessError if a worker died, RuntimeError if it failed.
        """
        file = partial.directory / _JOB
        file.write_bytes(pickle.dumps((job, start, work)))
        desk = _Desk(self._pool, self._counters, file, self._workers * _UNDER_WAY, ledger)
        with self:  # what comes later needs their memory
            for shard in shards:
                report = partial.finished(shard.number)
                if report is None:
                    desk.submit(shard)
                else:
                    desk.adopt(shard, report)
            desk.finish()


# ------------------------------------------------------------------------------------------------------------- a worker


_counters: Any = None


def _begin(counters: Any) -> None:
    global _counters
    _counters = counters
    settle()


def _perform(file: Path, shard: Shard) -> ShardReport:
    return _prepared(file)(shard)


@lru_cache(maxsize=1)
def _prepared(file: Path) -> Work:
    """Learns the job, once: it is too large to come with every shard."""
    job, start, work = pickle.loads(file.read_bytes())
    start(job, _counters)
    return work


# --------------------------------------------------------------------------------------------------------------- shards


class _Desk:
    """Hands out shards and takes reports."""

    def __init__(self, pool: ProcessPoolExecutor, counters: Any, job: Path, most: int, ledger: Ledger) -> None:
        self._pool, self._counters, self._job, self._most, self._ledger = pool, counters, job, most, ledger
        self._under_way: dict[Future[ShardReport], Shard] = {}
        self._ready: dict[int, ShardReport] = {}
        self._next = 0

    def submit(self, shard: Shard) -> None:
        """Hands out a shard, once there is room for it."""
        while len(self._under_way) >= self._most:
            self._collect()
        try:
            self._under_way[self._pool.submit(_perform, self._job, shard)] = shard
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
