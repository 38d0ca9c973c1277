"""Windows cover every token once with the promised context, and batches hold every row once in equal shapes."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_patch.evaluation.windows import batches, rolling


def pairs(size: int, seq_length: int, stride: int, begin: tuple[int, ...] = (-100,)) -> list[tuple[list, list]]:
    """What the model sees and what counts, as lm-evaluation-harness has its windows."""
    found = rolling(np.arange(size), begin, seq_length, stride)
    return [(row.ids[:-1].tolist(), row.ids[len(row.ids) - row.counts :].tolist()) for row in found]


def test_windows_are_those_of_the_harness() -> None:
    # get_rolling_token_windows(list(range(11)), -100, 4, context_len) of lm_eval 0.4.13
    assert pairs(11, 4, 4) == [  # context_len=1
        ([-100, 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([6, 7, 8, 9], [8, 9, 10]),
    ]
    assert pairs(11, 4, 2) == [  # context_len=3
        ([-100, 0, 1, 2], [0, 1, 2, 3]),
        ([1, 2, 3, 4], [4, 5]),
        ([3, 4, 5, 6], [6, 7]),
        ([5, 6, 7, 8], [8, 9]),
        ([6, 7, 8, 9], [10]),
    ]


@pytest.mark.parametrize("begin", [(-1,), (-1, -2, -3)])
@pytest.mark.parametrize("stride", [1, 3, 7])
def test_every_token_counts_once_with_the_promised_context(stride: int, begin: tuple[int, ...]) -> None:
    seq_length = 7
    for size in range(1, 30):
        seen = []
        for row in rolling(np.arange(size), begin, seq_length, stride):
            assert row.length <= seq_length
            context = len(row.ids) - row.counts
            counted = row.ids[context:].tolist()
            assert context >= min(counted[0] + len(begin), seq_length - stride + 1)
            seen += counted
        assert seen == list(range(size))


def test_what_begins_a_document_must_fit() -> None:
    with pytest.raises(ValueError, match="seq_length=2 must have room for the 3 tokens that begin a document"):
        pairs(5, 2, 1, (7, 8, 9))


def test_nothing_is_no_window() -> None:
    assert pairs(0, 4, 4) == []


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("most", [1, 8])
def test_every_row_is_in_one_batch_and_one_share(ranks: int, micro_batch_size: int, most: int) -> None:
    for count in (0, 1, 5, 8, 40):
        lengths = [(number * 7) % 11 + 1 for number in range(count)]
        found = []
        for batch in batches(lengths, micro_batch_size, ranks, most):
            shares = [batch.share(rank, number) for number in range(batch.num_microbatches) for rank in range(ranks)]
            assert batch.num_microbatches <= most
            assert {len(share) for share in shares} == {batch.micro_batch_size}
            assert batch.micro_batch_size <= micro_batch_size
            rows = [row for share in shares for row in share if row is not None]
            assert batch.length == max(lengths[row] for row in rows)
            found += rows
        assert sorted(found) == list(range(count))
        assert [lengths[row] for row in found] == sorted(lengths, reverse=True)


def test_only_the_last_batch_has_places_without_a_row() -> None:
    *full, last = batches([5] * 21, 4, 2, 1)
    assert all(None not in batch.rows for batch in full)
    assert (last.micro_batch_size, last.rows.count(None)) == (3, 1)
