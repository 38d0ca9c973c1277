"""Packs are full, exact, and the same every time."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_patch.data.sft.packing import efficiency, pack


def long_tailed(count: int, capacity: int, seed: int = 0) -> np.ndarray:
    """Lengths as instruction data has them: a median of some 70 tokens, and a long tail."""
    drawn = np.exp(np.random.default_rng(seed).normal(4.2, 1.0, count)).astype(int) + 1
    return np.minimum(drawn, capacity)


def by_trying_every_pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit, the longest first, written plainly."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    since: list[int] = []  # when a pack came to have its room
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for step, number in enumerate(order):
        fitting = [(rooms[i], since[i], i) for i in range(len(packs)) if rooms[i] >= lengths[number]]
        if fitting:
            chosen = min(fitting)[2]
        else:
            chosen = len(packs)
            packs.append([])
            rooms.append(capacity)
            since.append(step)
        packs[chosen].append(number)
        rooms[chosen] -= lengths[number]
        since[chosen] = step
    return sorted(sorted(one) for one in packs)


def fewest_packs(lengths: Sequence[int] | np.ndarray, capacity: int) -> int:
    """A number of packs that no packing can do with less: by the sum, and by samples of more than half a pack."""
    sizes = np.asarray(lengths, np.int64)
    return max(-(-int(sizes.sum()) // capacity), int((2 * sizes > capacity).sum()))


def test_it_is_best_fit_decreasing() -> None:
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, 40, 120).tolist()
        assert pack(lengths, 64) == by_trying_every_pack(lengths, 64)


@pytest.mark.parametrize("capacity", [512, 2048, 4096])
def test_long_tailed_lengths_fill_99_percent(capacity: int) -> None:
    lengths = long_tailed(22_000, capacity)
    packs = pack(lengths, capacity)
    assert efficiency(lengths, len(packs), capacity) >= 0.99
    assert len(packs) <= 1.001 * fewest_packs(lengths, capacity) + 1


def test_every_sample_is_in_one_pack_and_no_pack_overflows() -> None:
    lengths = long_tailed(3000, 512)
    packs = pack(lengths, 512)
    assert sorted(number for one in packs for number in one) == list(range(3000))
    assert max(int(lengths[one].sum()) for one in packs) <= 512


def test_exact_fills_are_used() -> None:
    assert pack([5, 3, 8, 4, 4], 8) == [[0, 1], [2], [3, 4]]
    assert pack([8] * 3, 8) == [[0], [1], [2]]
    assert pack([1] * 8, 8) == [list(range(8))]


def test_the_same_lengths_make_the_same_packs() -> None:
    lengths = long_tailed(2000, 512)
    assert pack(lengths, 512) == pack(lengths.tolist(), 512)


@pytest.mark.parametrize("length", [9, 0, -1])
def test_a_sample_that_no_pack_takes_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"1 samples cannot be packed: sample 1 has {length} tokens"):
        pack([8, length], 8)


def test_no_samples_make_no_packs() -> None:
    assert pack([], 8) == []


def test_a_hundred_thousand_samples_take_seconds_at_most() -> None:
    lengths = long_tailed(100_000, 8192)
    start = time.process_time()
    pack(lengths, 8192)
    assert time.process_time() - start < 3


def test_a_bound_is_a_bound() -> None:
    assert (fewest_packs([5, 5, 5], 8), fewest_packs([4, 4, 4], 8), fewest_packs([1], 8)) == (3, 2, 1)
