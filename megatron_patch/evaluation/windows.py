"""Which tokens a model sees at once, and which of them count: documents to rows, and rows to batches.

    seq_length 4, stride 2, a document of 8 tokens a to h after ^, which begins it

        sees ^ a b c    to predict a b c d
        sees b c d e    to predict e f
        sees d e f g    to predict g h

It knows numbers: no tensors, no model, no processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np


@dataclass(frozen=True)
class Row:
    """Tokens for one pass of the model: all but the last are its input, all but the first are to be predicted."""

    ids: np.ndarray
    """Token ids; at least two."""
    counts: int
    """How many of them count, from the end."""

    @property
    def length(self) -> int:
        """Tokens of the input."""
        return len(self.ids) - 1


def rolling(ids: np.ndarray, begin: Sequence[int], seq_length: int, stride: int) -> Iterator[Row]:
    """The windows of one document; each of its tokens counts in exactly one.

    The first window is full, if the document is long enough; each further one ends `stride` tokens later, and the last
    one with the document. So a token has all tokens before it as context, or at least ``seq_length - stride`` of them
    (in fact one more). With ``stride = seq_length - context_len + 1`` these are the windows of EleutherAI's
    lm-evaluation-harness (`get_rolling_token_windows`).

    Args:
        ids: the document, without what begins it.
        begin: what its first token is given; it does not count.
        seq_length: tokens of the input, at most.
        stride: 1 to `seq_length`.
    """
    assert 1 <= stride <= seq_length
    if not 0 < len(begin) <= seq_length:
        raise ValueError(f"seq_length={seq_length} must have room for the {len(begin)} tokens that begin a document")
    whole = np.concatenate([np.asarray(begin, ids.dtype), ids])
    end = min(len(whole), seq_length + 1)
    counts = end - len(begin)
    while counts:
        yield Row(whole[max(0, end - seq_length - 1) : end], counts)
        counts = min(stride, len(whole) - end)
        end += counts


def sums(found: np.ndarray, documents: Sequence[Sequence[Row]]) -> np.ndarray:
    """What was found of the rows of all documents, one after another, added up for each document."""
    ends = accumulate(map(len, documents), initial=0)
    return np.array([found[first:last].sum() for first, last in pairwise(ends)])


@dataclass(frozen=True)
class Batch:
    """Rows that all data-parallel ranks handle in one call: `num_microbatches` times, each `micro_batch_size` rows."""

    rows: tuple[int | None, ...]
    """Numbers of the rows: the first micro-batch of each rank in turn, then the second of each; None is no row."""
    micro_batch_size: int
    num_microbatches: int
    length: int
    """Tokens of the longest input."""

    def share(self, rank: int, microbatch: int) -> tuple[int | None, ...]:
        """The rows of one rank's micro-batch."""
        ranks = len(self.rows) // (self.micro_batch_size * self.num_microbatches)
        first = (microbatch * ranks + rank) * self.micro_batch_size
        return self.rows[first : first + self.micro_batch_size]


def batches(lengths: Sequence[int], micro_batch_size: int, ranks: int, most_microbatches: int) -> Iterator[Batch]:
    """All rows, those of like length together, which spares padding; the longest first: memory runs out early, if ever.

    Every rank has the same shapes in every call, as pipeline stages and experts on several ranks want it.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    step = micro_batch_size * ranks
    full = len(order) // step
    for first in range(0, full, most_microbatches):
        rows = order[first * step : min(full, first + most_microbatches) * step]
        yield Batch(tuple(rows), micro_batch_size, len(rows) // step, lengths[rows[0]])
    if rest := order[full * step :]:
        size = -(-len(rest) // ranks)
        yield Batch((*rest, *[None] * (size * ranks - len(rest))), size, 1, lengths[rest[0]])
