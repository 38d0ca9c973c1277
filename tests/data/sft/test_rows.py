"""Rows of samples: every sample once an epoch, nothing learned across a boundary, the same rows for whoever asks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_patch.data.datasets import batches
from megatron_patch.data.sft.rows import PADDING, Joined, Rows, RowSpec, make_row
from megatron_patch.data.sft.samples import Sample, sample

SPEC = RowSpec(seq_length=32)


class Memory:
    """Samples in memory; the first id of each tells its number."""

    def __init__(self, count: int, seed: int = 0, first: int = 0) -> None:
        random = np.random.RandomState(seed)
        sizes = random.randint(2, 33, count)
        self.samples = [sample(random.randint(500, 900, n), random.rand(n) < 0.5) for n in sizes]
        for number, one in enumerate(self.samples):
            one.ids[0], one.mask[-1] = first + number, True
        self.lengths = sizes

    def sample(self, index: int) -> Sample:
        return self.samples[index]


def numbers(row: dict[str, torch.Tensor]) -> list[int]:
    """Which samples are in a row, in order."""
    index = torch.arange(len(row["starts"]))
    return row["tokens"][row["starts"] == index].tolist()


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_has_every_sample_once_in_an_order_of_its_own(packing: bool) -> None:
    rows = Rows(Memory(50), replace(SPEC, packing=packing))
    size = rows.rows_per_epoch
    assert (size == 50) if not packing else (size < 35)
    epochs = [[tuple(numbers(rows.extended(3 * size)[e * size + i])) for i in range(size)] for e in range(3)]
    for epoch in epochs:
        assert sorted(number for row in epoch for number in row) == list(range(50))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert packing == any(len(row) > 1 for row in epochs[0])


def test_the_seed_decides_the_order_and_nothing_else_does() -> None:
    def order(seed: int) -> list[list[int]]:
        rows = Rows(Memory(50), replace(SPEC, seed=seed)).extended(60)
        return [numbers(rows[i]) for i in (*range(50, 60), *range(50))]  # asked for in any order

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("loss_per", ["token", "sequence"])
def test_a_row_learns_what_each_sample_alone_would(loss_per: Any) -> None:
    samples = [
        sample([5, 6, 7, 8], [False, False, True, True]),
        sample([9, 10], [True, True]),  # its first token has nothing before it to predict it
        sample([11, 12, 13], [False, True, False]),
    ]
    row = make_row(samples, RowSpec(12, loss_per=loss_per))
    half = 0.5 if loss_per == "sequence" else 1.0
    assert row["tokens"].tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 0, 0, 0]
    assert row["labels"].tolist() == [6, 7, 8, 0, 10, 0, 12, 13, 0, 0, 0, 0]
    assert row["loss_mask"].tolist() == [0, half, half, 0, 1, 0, 1, 0, 0, 0, 0, 0]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 0, 0]
    assert row["starts"].tolist() == [0, 0, 0, 0, 4, 4, 6, 6, 6, PADDING, PADDING, PADDING]


def test_a_row_can_be_filled_to_the_last_slot() -> None:
    row = make_row([sample([5] * 6, [True] * 6), sample([7] * 4, [True] * 4)], RowSpec(10))
    assert row["starts"].tolist() == [0] * 6 + [6] * 4
    assert row["loss_mask"].tolist() == [1] * 5 + [0] + [1] * 3 + [0]


def test_rows_beyond_the_last_epoch_are_empty() -> None:
    rows = Rows(Memory(20), SPEC)
    wanted = 2 * rows.rows_per_epoch
    longer = rows.extended(wanted + 3, epochs=2)
    assert len(longer) == wanted + 3 and longer[wanted - 1]["loss_mask"].sum() > 0
    for index in range(wanted, wanted + 3):
        assert longer[index]["loss_mask"].sum() == 0
        assert longer[index]["starts"].tolist() == [0] + [PADDING] * 31  # something to attend to
    assert rows.extended(wanted + 3)[wanted]["loss_mask"].sum() > 0
    with pytest.raises(IndexError):
        longer[wanted + 3]


def test_sources_come_as_often_as_asked_for() -> None:
    joined = Joined([Memory(10), Memory(8, first=100)], [2.0, 0.5], seed=1)
    rows = Rows(joined, SPEC)
    size, longer = rows.rows_per_epoch, rows.extended(2 * rows.rows_per_epoch)
    first, second = (sorted(n for i in range(size) for n in numbers(longer[begin + i])) for begin in (0, size))
    assert first == second and first[:20] == sorted([*range(10)] * 2)
    assert len(set(first[20:])) == 4 == len(first[20:]) and min(first[20:]) >= 100


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_and_micro_batches_share_the_same_rows_and_go_on_where_they_were(packing: bool) -> None:
    rows = Rows(Memory(60), replace(SPEC, packing=packing)).extended(48)
    plain = [batch["tokens"][0].tolist() for batch in batches(rows, 0, 1, 1000)]
    for ranks, size, consumed in ((2, 1, 0), (1, 4, 0), (2, 4, 16), (2, 2, 24)):
        shares = [list(batches(rows, consumed, size, 1000, rank, ranks)) for rank in range(ranks)]
        steps = zip(*shares, strict=True)
        found = [row.tolist() for step in steps for batch in step for row in batch["tokens"]]
        assert found == plain[consumed:]


def test_batches_carry_the_boundaries() -> None:
    (batch,) = batches(Rows(Memory(9), SPEC).extended(4), 0, 4, 1000)
    assert batch["starts"].shape == (4, 32) and batch["starts"].dtype == torch.int64


def test_readers_of_their_own_process_give_the_same() -> None:
    rows = Rows(Memory(30), SPEC).extended(40)
    here, there = (list(batches(rows, 0, 2, 1000, num_workers=n)) for n in (0, 2))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(here, there, strict=True) for key in a)
    assert len(here) == len(there) == 20


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="5 of 5 samples have more than --seq-length 1 tokens, the first has"):
        Rows(Memory(5), replace(SPEC, seq_length=1))


def test_a_sample_without_anything_to_learn_is_refused() -> None:
    memory = Memory(5)
    memory.samples[3].mask[:] = [True] + [False] * (len(memory.samples[3].mask) - 1)
    rows = Rows(memory, SPEC)
    with pytest.raises(ValueError, match="sample 3 has no token that is to be learned"):
        [rows[i] for i in range(rows.rows_per_epoch)]


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="the data holds token id"):
        list(batches(Rows(Memory(9), SPEC), 0, 1, 600))
