"""Samples into packs of one length, each sample whole: best fit, the longest sample first.

    packs = pack(lengths, 4096)             # [[17, 3], [8], ...]: numbers of samples
    efficiency(lengths, packs, 4096)        # share of all slots that hold a token

Packs of equal room are interchangeable, so the rooms there are form a set of at most `capacity` numbers; a bit mask of
it finds the smallest room that is large enough in one operation. The result depends on the lengths alone: of equally
long samples the earlier one comes first, of equally full packs the earlier one is filled. It does not know tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Numbers of the samples of each pack. Packs come in the order of their first samples' numbers, and so do samples.

    Raises ValueError if a sample is longer than a pack, or has no token.
    """
    sizes = np.asarray(lengths, np.int64)
    _require_fit(sizes, capacity)
    packs: list[list[int]] = []
    open_packs: list[deque[int]] = [deque() for _ in range(capacity + 1)]
    """Packs by the room that is left in them."""
    rooms = 0
    """Bit r is set where a pack has room r."""
    for number in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[number])
        larger = rooms >> size
        if larger:
            room = size + (larger & -larger).bit_length() - 1
            chosen = open_packs[room].popleft()
            if not open_packs[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(packs)
            packs.append([])
        packs[chosen].append(number)
        left = room - size
        if left:
            open_packs[left].append(chosen)
            rooms |= 1 << left
    return sorted(sorted(one) for one in packs)


def _require_fit(sizes: np.ndarray, capacity: int) -> None:
    wrong = np.flatnonzero((sizes > capacity) | (sizes < 1))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{len(wrong)} samples cannot be packed: sample {first} has {sizes[first]} tokens, a pack takes 1 to "
            f"{capacity}; truncate or drop them first"
        )


def efficiency(lengths: Sequence[int] | np.ndarray, num_packs: int, capacity: int) -> float:
    """Share of the slots of so many packs that hold a token."""
    return int(np.asarray(lengths, np.int64).sum()) / max(1, num_packs * capacity)
