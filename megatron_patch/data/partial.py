"""PREFIX.partial/: the finished shards of a run that has not come to its end, and what they were made with.

    with partial_run(directory, settings, resume=True, dtype_bytes=2) as run:
        report = run.finished(shard_number)        # of an earlier, killed run; None if there is none

The directory goes when `run.remove()` says so, else it stays and the next run with the same settings goes on from it.
Shards made with other settings are never mixed: the settings lie beside them. It does not know what a shard holds.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_patch.data.arguments import SETTINGS
from megatron_patch.data.indexed import replacing
from megatron_patch.data.tokenizing import ShardReport, key_file, report_file

_LOCK = "lock"


class PartialRun:
    """The directory of one run, held by this process."""

    def __init__(self, directory: Path, dtype_bytes: int) -> None:
        self.directory = directory
        self._dtype_bytes = dtype_bytes

    def finished(self, number: int) -> ShardReport | None:
        """The report of a shard that is whole."""
        path = report_file(self.directory, number)
        if not path.is_file():
            return None
        report = ShardReport.from_json(json.loads(path.read_bytes()))
        whole = all(
            _size(key_file(self.directory, number, index, "bin")) == key.tokens * self._dtype_bytes
            and _size(key_file(self.directory, number, index, "len")) == key.documents * 4
            for index, key in enumerate(report.keys)
        )
        return report if whole else None

    def has_shards(self) -> bool:
        """Whether there is anything to go on from."""
        return any(self.directory.glob("[0-9]*.json"))

    def clear(self) -> None:
        """Forgets all shards; the directory and its settings stay."""
        for file in self.directory.iterdir():
            if file.name not in (SETTINGS, _LOCK):
                file.unlink()

    def remove(self) -> None:
        """Removes all of it."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


@contextmanager
def partial_run(
    directory: Path, settings: Mapping[str, Any], *, resume: bool, dtype_bytes: int
) -> Iterator[PartialRun]:
    """Opens the directory of a run, for one process at a time.

    What was finished stays there if the block ends with an error; the directory goes if nothing was.

    Raises:
        ValueError: another process is at work here, or shards made with other settings lie here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / _LOCK, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{directory} is being written by another process") from None
        run = PartialRun(directory, dtype_bytes)
        _adopt(run, settings, resume)
        try:
            yield run
        finally:
            if directory.is_dir() and not run.has_shards():
                run.remove()


def _adopt(run: PartialRun, settings: Mapping[str, Any], resume: bool) -> None:
    path = run.directory / SETTINGS
    wanted = json.loads(json.dumps(settings))
    found = json.loads(path.read_bytes()) if path.is_file() else None
    if not resume or found is None:
        run.clear()
    elif found != wanted:
        changed = [_change(name, found.get(name), value) for name, value in wanted.items() if found.get(name) != value]
        raise ValueError(
            f"{run.directory} holds the finished part of a run with other settings ({'; '.join(changed)}): give those "
            "again to go on with it, or --resume never to start anew"
        )
    with replacing(path) as file:
        file.write(json.dumps(wanted, indent=1).encode())


def _change(name: str, before: Any, now: Any) -> str:
    """What differs, short enough for a line."""
    if isinstance(before, list) and isinstance(now, list):
        pairs = [(old, new) for old, new in zip(before, now, strict=False) if old != new]
        if len(before) != len(now) or not pairs:
            return f"{name}: {len(before)}, now {len(now)}"
        before, now = pairs[0]
    return f"{name}: {before}, now {now}"
