"""The tokens of a .bin file in blocks.

Files are read, not mapped: a file that another process shortens meanwhile is an error here, not the end of the process.
It does not know what the tokens mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_patch.data.index_file import IndexFile
from megatron_patch.progress import Progress

_BLOCK = 1 << 22
"""Tokens that are in memory at a time."""


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
                progress(block.nbytes)


def read_tokens(index: IndexFile, begin: int, end: int) -> np.ndarray:
    """The tokens with these numbers."""
    itemsize = index.dtype.itemsize
    return np.fromfile(f"{index.prefix}.bin", index.dtype, int(end - begin), offset=int(begin) * itemsize)
