"""A pool of long-lived gloo workers, shared by every multi-process test of a pytest session.

Use the `pool` fixture: `pool.run(function, world_size, *args)` calls `function(rank, world_size, *args)` in
`world_size` processes that form one torch.distributed gloo group, and returns the results in rank order. `function`
stands at module level, since it travels by name. Starting a process and importing torch and megatron-core takes
seconds; the workers pay that once and every call after it takes milliseconds.

A worker that raises fails the call with its own traceback; a call that takes longer than its timeout kills the workers,
and the next call starts new ones. The pool knows nothing about models or tests.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GRACE_SECONDS = 3.0
"""How long the other ranks may take to answer once one rank has failed: they may sit in a collective with it."""


class WorkerError(AssertionError):
    """A rank raised, died or did not answer in time; the message carries its traceback."""


@dataclass(frozen=True)
class Call:
    """What a worker is sent: one function to run as one rank of a fresh process group."""

    function: Callable[..., Any]
    rank: int
    world_size: int
    init_file: str
    timeout: float
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    """What a worker sends back."""

    value: Any = None
    error: str | None = None
    alive: bool = True


# ---------------------------------------------------------------- in the worker


def _worker(connection: Connection, stack_file: Path) -> None:
    """Answers calls until the parent closes its end."""
    import torch

    import megatron_patch.backend

    torch.set_num_threads(1)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    faulthandler.register(signal.SIGUSR1, file=stack_file.open("w"), all_threads=False)
    # What megatron-core says while it is imported (no Transformer Engine, no apex) is true of every test: say it never.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    megatron_patch.backend.install()
    while True:
        try:
            path, payload = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        sys.path[:] = path  # test modules are found where pytest found them
        connection.send_bytes(_answer(payload))


def _leave_with(parent: int) -> None:
    """End this process when pytest is gone: a worker that waits for its peers in a collective never reads its pipe."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _answer(payload: bytes) -> bytes:
    """The pickled answer to one pickled call; never raises."""
    try:
        return pickle.dumps(Answer(value=_run_in_group(pickle.loads(payload))))
    except BaseException:  # SystemExit too: whatever the function does is the parent's to report
        return pickle.dumps(Answer(error=traceback.format_exc()))


def _run_in_group(call: Call) -> Any:
    import torch

    environment = {"RANK": call.rank, "LOCAL_RANK": call.rank, "WORLD_SIZE": call.world_size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.manual_seed(0)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{call.init_file}",
        rank=call.rank,
        world_size=call.world_size,
        timeout=timedelta(seconds=call.timeout + 60),  # the pool notices a hang first
    )
    try:
        value = call.function(call.rank, call.world_size, *call.args)
        # A rank that closes its sockets while another still connects makes that one fail.
        torch.distributed.barrier()
        return value
    finally:
        _forget_group()
        for name in environment:
            os.environ.pop(name, None)


def _forget_group() -> None:
    """Takes back what a call may have left in the process: groups, and megatron-core's module-level state."""
    import torch
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- in the test process


@dataclass(frozen=True)
class Worker:
    """One process as the test process sees it."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    stack_file: Path
    """Where the process writes its stack on SIGUSR1."""


class Pool:
    """Starts workers when they are first needed and keeps them until `close`."""

    def __init__(self, timeout: float = 180.0) -> None:
        self.timeout = timeout
        self._workers: list[Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="gloo-workers-")

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float | None = None) -> list[Any]:
        """Returns `function(rank, world_size, *args)` of every rank, in rank order."""
        self._start(world_size)
        seconds = timeout or self.timeout
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            for rank, worker in enumerate(self._workers[:world_size]):
                call = Call(function, rank, world_size, str(Path(folder) / "rendezvous"), seconds, args)
                worker.connection.send_bytes(pickle.dumps((sys.path, pickle.dumps(call))))
            answers = self._collect(world_size, seconds)
        self._raise_errors(function, answers, world_size, seconds)
        return [answers[rank].value for rank in range(world_size)]

    def close(self) -> None:
        """Ends every worker, busy or not."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.join()
        self._workers.clear()

    def _start(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # megatron-core makes some twenty groups for each call; most of their processes never talk to one another.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        while len(self._workers) < world_size:
            ours, theirs = context.Pipe()
            stack_file = Path(self._folder.name) / f"stack-{len(self._workers)}"
            process = context.Process(target=_worker, args=(theirs, stack_file))
            process.start()
            theirs.close()
            self._workers.append(Worker(process, ours, stack_file))

    def _collect(self, world_size: int, seconds: float) -> dict[int, Answer]:
        """The answers that arrive in time, by rank; after the first failure the rest get a short grace only."""
        answers: dict[int, Answer] = {}
        ranks = {worker.connection: rank for rank, worker in enumerate(self._workers[:world_size])}
        deadline = time.monotonic() + seconds
        while ranks:
            ready = wait(list(ranks), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                answer = _receive(connection)
                answers[ranks.pop(connection)] = answer
                if answer.error:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def _raise_errors(
        self, function: Callable[..., Any], answers: dict[int, Answer], world_size: int, seconds: float
    ) -> None:
        failed = {rank: answers[rank].error for rank in sorted(answers) if answers[rank].error}
        silent = [rank for rank in range(world_size) if rank not in answers]
        if not failed and not silent:
            return
        texts = [f"rank {rank}: {error}" for rank, error in failed.items()]
        if silent:
            limit = f"{GRACE_SECONDS:g} s after another rank failed" if failed else f"{seconds:g} s"
            texts.append(f"no answer from rank {', '.join(map(str, silent))} within {limit}")
            texts += self._stacks(silent)
        # A rank that left a collective alone may leave its peers in any state; only a failure of all of them is clean.
        if len(failed) < world_size or not all(answer.alive for answer in answers.values()):
            self.close()
        where = f"{function.__module__}.{function.__qualname__} on {world_size} processes"
        raise WorkerError("\n".join([f"{where} failed", *texts]))

    def _stacks(self, ranks: list[int]) -> list[str]:
        """Where each of these workers is stuck."""
        for rank in ranks:
            os.kill(self._workers[rank].process.pid, signal.SIGUSR1)
        time.sleep(0.2)  # for the signal handlers to write
        return [f"rank {rank}: {self._workers[rank].stack_file.read_text()}" for rank in ranks]


def _receive(connection: Connection) -> Answer:
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        return Answer(error="the process died without an answer (killed, or crashed in native code)", alive=False)
