"""What shortens the start: Python takes seconds to import torch and megatron-core, and to describe a large model.

It imports nothing heavy, and knows no formats, only where a checkpoint's files lie.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_patch.checkpoint import directory

_BYTES = 2**31


def read_ahead(path: str | Path) -> None:
    """Bring the first files below a directory into the page cache, in the background; errors are left to the reader."""
    threading.Thread(target=_advise, args=(Path(path),), daemon=True).start()


def _advise(path: Path) -> None:
    with suppress(OSError, ValueError):
        _advise_all(directory.locate(path)[1] if directory.is_megatron(path) else path)


def _advise_all(path: Path) -> None:
    left = _BYTES
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        size = min(file.stat().st_size, left)
        left -= size
        if size == 0:
            continue
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_WILLNEED)
        os.close(descriptor)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Modules and the parts of a large model are many objects, none garbage: looking takes a quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
