"""The processes that share one conversion: alone, or all that torchrun started, on one machine or several.

They share a file system and the list of files; each writes its own files. It knows nothing of checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Crew:
    """One of `size` processes."""

    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()

    def share(self, files: Mapping[str, int]) -> set[str]:
        """The files that are this process's: neighbours, of about the same number of bytes for each process."""
        total, passed, mine = sum(files.values()) or 1, 0, set()
        for file, nbytes in files.items():
            if min((passed + nbytes / 2) * self.size // total, self.size - 1) == self.rank:
                mine.add(file)
            passed += nbytes
        return mine


@contextmanager
def assembled() -> Iterator[Crew]:
    """The crew that torchrun's environment describes; without one: this process alone."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Crew()
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Crew(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
