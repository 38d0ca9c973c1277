"""A process that converts and is killed (SIGKILL) at many of the things it does to the disk; for test_kill.py.

    python -m tests.checkpoint.dying SOURCE TARGET MOMENTS

Converts once into TARGET.whole to count the events (a tensor written, an fsync, a rename). Then forks for about MOMENTS
of them, the last ones included; each child kills itself right before its event, and a line says what
`megatron_patch.checkpoint.directory` then thinks of TARGET. At last it converts undisturbed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint.convert import convert


class Events:
    """Counts, and dies at one."""

    def __init__(self, deadly: int | None) -> None:
        self.count, self._deadly = 0, deadly

    def happen(self) -> None:
        if self.count == self._deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.happen()
            return function(*args)

        return counted


def run(source: str, target: str, deadly: int | None = None) -> int:
    """Convert, and die at event `deadly`; returns the number of events."""
    events = Events(deadly)
    os.fsync, os.rename = events.before(os.fsync), events.before(os.rename)
    layout._exchange = events.before(layout._exchange)
    convert(source, target, overwrite=True, progress=lambda *_: events.happen())
    return events.count


def verdict(target: str) -> str:
    """What a reader would make of the target."""
    if layout.is_huggingface(target):
        return f"huggingface {layout.read_config(target)['vocab_size']}"
    if not Path(target).exists():
        return "nothing"
    return f"megatron {layout.latest(target)[1]} {layout.read_config(target)['vocab_size']}"


def forked(*args: Any) -> tuple[int, bool]:
    """`run` in a child: the number of events, and whether it was killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, str(run(*args)).encode())
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    os.close(writer)
    with open(reader) as answer:
        return int(answer.read() or 0), os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def main(source: str, target: str, moments: str) -> None:
    count, _ = forked(source, f"{target}.whole")
    for event in sorted({*range(0, count, max(1, count // int(moments))), *range(count - 4, count)}):
        _, killed = forked(source, target, event)
        print("killed" if killed else "survived", verdict(target))
    _, killed = forked(source, target)
    print("killed" if killed else "survived", verdict(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
