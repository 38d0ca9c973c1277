"""Has the beginning of a checkpoint read from disk while Python is still importing: both take seconds.

It imports nothing heavy, and knows no formats.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

_BYTES = 2**31


def read_ahead(path: str | Path) -> None:
    """Bring the first files below a directory into the page cache, in the background; errors are left to the reader."""
    threading.Thread(target=_advise, args=(Path(path),), daemon=True).start()


def _advise(path: Path) -> None:
    left = _BYTES
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        size = min(file.stat().st_size, left)
        left -= size
        if size == 0:
            continue
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_WILLNEED)
        os.close(descriptor)
