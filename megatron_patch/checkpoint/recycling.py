"""Large temporaries in memory that was used before: fresh memory costs a page fault for every 4 KiB of it.

    pool = Pool(limit)
    with pool.recycled():          # in any thread
        torch.cat(...)             # its result lies in the pool's memory, and is gone when the block ends

Only what makes the large temporaries of a conversion is caught: concatenations, and copies into order. Everything else
allocates as ever. It knows nothing of checkpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SMALL = 2**20
"""Below so many bytes the allocator's own way is good."""


class Pool:
    """Blocks of memory for several threads.

    Args:
        limit: bytes above which it keeps none for later; what is in use counts, and is never refused.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._lock, self._used = limit, threading.Lock(), 0
        self._free: list[Tensor] = []

    @contextmanager
    def recycled(self) -> Iterator[None]:
        """Within it, large temporaries of this thread come from the pool; they must not outlive it."""
        taken: list[Tensor] = []

        def take(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            count = torch.Size(shape).numel()
            taken.append(self._take(count * dtype.itemsize))
            return taken[-1][: count * dtype.itemsize].view(dtype).view(tuple(shape))

        try:
            with _Caught(take):
                yield
        finally:
            self._give(taken)

    def _take(self, nbytes: int) -> Tensor:
        with self._lock:
            self._used += nbytes
            # The layers of a model are alike: a block of the very size is there, or will be wanted again.
            fitting = next((i for i, block in enumerate(self._free) if block.numel() == nbytes), None)
            if fitting is not None:
                return self._free.pop(fitting)
            self._shrink()
        return torch.empty(nbytes, dtype=torch.uint8)

    def _give(self, blocks: Sequence[Tensor]) -> None:
        with self._lock:
            self._used -= sum(block.numel() for block in blocks)
            self._free += blocks
            self._shrink()

    def _shrink(self) -> None:
        while self._free and self._used + sum(block.numel() for block in self._free) > self._limit:
            self._free.pop(0)


class _Caught(TorchDispatchMode):
    """Gives large results of some operations a place."""

    def __init__(self, take: Callable[[Sequence[int], torch.dtype], Tensor]) -> None:
        super().__init__()
        self._take = take

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten.cat.default and _large(args[0][0], sum(one.numel() for one in args[0])):
            return self._cat(*args, **kwargs)
        if function is torch.ops.aten.clone.default and _large(args[0], args[0].numel()):
            return self._take(args[0].shape, args[0].dtype).copy_(args[0])
        return function(*args, **kwargs)

    def _cat(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        shape = list(tensors[0].shape)
        shape[dim] = sum(one.shape[dim] for one in tensors)
        return torch.cat(list(tensors), dim, out=self._take(shape, tensors[0].dtype))


def _large(like: Tensor, count: int) -> bool:
    return like.device.type == "cpu" and count * like.itemsize >= _SMALL
