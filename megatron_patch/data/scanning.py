"""The tokens of a .bin file in blocks, and how far one has come.

Files are read, not mapped: a file that another process shortens meanwhile is an error here, not the end of the process.
It does not know what the tokens mean.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from megatron_patch.data.index_file import IndexFile

_BLOCK = 1 << 22
"""Tokens that are in memory at a time."""

_SECONDS_BETWEEN_LINES = 10.0


def token_blocks(index: IndexFile, progress: Progress | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """All tokens in order: the number of the first token of each block, and the block."""
    first, total = 0, index.num_tokens
    with open(f"{index.prefix}.bin", "rb") as file:
        while first < total:
            block = np.fromfile(file, index.dtype, min(_BLOCK, total - first))
            if not block.size:
                raise OSError(f"{index.prefix}.bin ends after {first} of {total} tokens: it was shortened meanwhile")
            yield first, block
            first += block.size
            if progress is not None:
                progress.advance(block.nbytes)


def read_tokens(index: IndexFile, begin: int, end: int) -> np.ndarray:
    """The tokens with these numbers."""
    itemsize = index.dtype.itemsize
    return np.fromfile(f"{index.prefix}.bin", index.dtype, int(end - begin), offset=int(begin) * itemsize)


class Progress:
    """A bar with rate and time left on a terminal; elsewhere a plain line every ten seconds. A context manager."""

    def __init__(self, name: str, total_bytes: int) -> None:
        self._name, self._total, self._done = name, total_bytes, 0
        self._start = self._last = time.monotonic()
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=name, disable=not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, num_bytes: int) -> None:
        """Moves on by so many bytes."""
        self._done += num_bytes
        self._bar.update(num_bytes)
        now = time.monotonic()
        if self._bar.disable and now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last, rate = now, self._done / (now - self._start)
            left = (self._total - self._done) / rate
            sizes = f"{self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB"
            print(f"{self._name}: {sizes}, {rate / 1e6:.0f} MB/s, {left:.0f} s left", file=sys.stderr, flush=True)
