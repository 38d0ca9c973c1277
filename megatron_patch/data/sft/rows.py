"""Samples to the rows of training batches: packed or one a row, in an order of their own every epoch.

    rows = Rows(store, RowSpec(seq_length=4096, packing=True))    # an epoch: rows.rows_per_epoch
    rows.extended(8000)[700]["tokens"]                            # int64 [seq_length]; see `Rows`

An epoch takes every sample once: shuffled by the seed and the epoch's number, packed as closely as can be, the packs
shuffled again. Row i of a run is the same whoever asks for it, so a run that was stopped goes on by counting rows.
It does not know text, models or the training loop.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_patch.data.sft.packing import efficiency, pack
from megatron_patch.data.sft.samples import Sample

LossPer = Literal["token", "sequence"]
PADDING = -1
"""What `starts` says of slots that belong to no sample."""


class Samples(Protocol):
    """What rows are made of: a store on disk, or some joined."""

    lengths: np.ndarray
    """Tokens of each sample."""

    def sample(self, index: int) -> Sample:
        """One sample."""


class Joined:
    """Several stores as one, each so many times.

    Args:
        stores: one or more.
        times: how often the samples of each come in an epoch. Of a fraction, as many samples as it says are drawn once
            and come in every epoch.
    """

    def __init__(self, stores: Sequence[Samples], times: Sequence[float], seed: int) -> None:
        self._stores = stores
        random = np.random.RandomState(seed)
        chosen = [_repeated(len(store.lengths), count, random) for store, count in zip(stores, times, strict=True)]
        self._store = np.repeat(np.arange(len(stores), dtype=np.int32), [len(one) for one in chosen])
        self._index = np.concatenate(chosen)
        self.lengths = np.concatenate(
            [np.asarray(store.lengths)[one] for store, one in zip(stores, chosen, strict=True)]
        )

    def sample(self, index: int) -> Sample:
        """One sample of one of them."""
        return self._stores[self._store[index]].sample(int(self._index[index]))


def _repeated(count: int, times: float, random: np.random.RandomState) -> np.ndarray:
    whole = int(times)
    drawn = random.permutation(count)[: round((times - whole) * count)]
    return np.concatenate([np.tile(np.arange(count), whole), np.sort(drawn)])


@dataclass(frozen=True)
class RowSpec:
    """How samples become rows."""

    seq_length: int
    """Slots of a row."""
    packing: bool = True
    """As many samples in a row as fit; else one."""
    seed: int = 1234
    """Of the order."""
    loss_per: LossPer = "token"
    """What weighs the same: every token that is learned, or every sample."""


class Epoch(NamedTuple):
    """The rows of an epoch."""

    order: np.ndarray
    """Numbers of samples, row after row."""
    ends: np.ndarray
    """Where in `order` each row ends."""

    def row(self, index: int) -> np.ndarray:
        """Numbers of the samples of one row."""
        return self.order[self.ends[index - 1] if index else 0 : self.ends[index]]


def epoch_of(lengths: np.ndarray, spec: RowSpec, number: int) -> Epoch:
    """The rows of one epoch; their number is the same in all.

    Raises ValueError if a sample is longer than a row.
    """
    too_long = np.flatnonzero(lengths > spec.seq_length)
    if len(too_long):
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} samples have more than --seq-length {spec.seq_length} tokens, the "
            f"first has {lengths[too_long[0]]}; give a larger one, or tokenize again with this one"
        )
    random = np.random.RandomState([spec.seed, number])
    shuffled = random.permutation(len(lengths))
    if not spec.packing:
        return Epoch(shuffled, np.arange(1, len(shuffled) + 1))
    packs = [shuffled[one] for one in pack(lengths[shuffled], spec.seq_length)]
    rows = [packs[i] for i in random.permutation(len(packs))]
    return Epoch(np.concatenate(rows), np.cumsum([len(row) for row in rows]))


class Rows(Dataset):
    """Rows, epoch after epoch. Those beyond the last epoch asked for are empty: they count for nothing.

    A row is a dict of tensors [seq_length]. tokens; labels: the next token of the same sample; position_ids: from 0 in
    every sample; starts: the slot where the token's sample begins, or PADDING; all int64. loss_mask: float32, 1 where
    the label is to be learned (1 / the number of those in the sample, per sequence), else 0.
    """

    def __init__(self, samples: Samples, spec: RowSpec) -> None:
        self._samples, self._spec, self._epochs = samples, spec, None
        self._lengths = np.asarray(samples.lengths)
        self._last = (0, epoch_of(self._lengths, spec, 0))
        self.rows_per_epoch = self._num_rows = len(self._last[1].ends)

    def extended(self, num_rows: int, epochs: int | None = None) -> Rows:
        """As many rows; empty ones after so many epochs, if a number is given."""
        other = copy.copy(self)
        other._num_rows, other._epochs = num_rows, epochs
        return other

    @property
    def filled(self) -> float:
        """Share of the slots that hold a token of a sample."""
        return efficiency(self._lengths, self.rows_per_epoch, self._spec.seq_length)

    def summary(self) -> str:
        """What there is to learn from, in a line."""
        return (
            f"{len(self._lengths):,} samples of {self._lengths.sum(dtype=np.int64):,} tokens in "
            f"{self.rows_per_epoch:,} rows of {self._spec.seq_length:,}, {self.filled:.1%} of them filled"
        )

    def _epoch(self, number: int) -> Epoch:
        if number != self._last[0]:
            self._last = (number, epoch_of(self._lengths, self._spec, number))
            assert len(self._last[1].ends) == self.rows_per_epoch, "packing depends on more than the lengths"
        return self._last[1]

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._num_rows:
            raise IndexError(f"row {index} of {self._num_rows}")
        number, place = divmod(index, self.rows_per_epoch)
        if self._epochs is not None and number >= self._epochs:
            return make_row([_NOTHING], self._spec)
        numbers = self._epoch(number).row(place)
        return make_row([self._usable(int(one)) for one in numbers], self._spec)

    def _usable(self, number: int) -> Sample:
        sample = self._samples.sample(number)
        if not sample.supervised:
            raise ValueError(f"sample {number} has no token that is to be learned; tokenize the data again")
        return sample


_NOTHING = Sample(np.zeros(1, np.int32), np.zeros(1, bool))
"""A row without any sample would have nothing to attend to."""


def make_row(samples: Sequence[Sample], spec: RowSpec) -> dict[str, torch.Tensor]:
    """One row of these samples; see `Rows`."""
    row = {name: np.zeros(spec.seq_length, np.int64) for name in ("tokens", "labels", "position_ids")}
    row["starts"] = np.full(spec.seq_length, PADDING)
    row["loss_mask"] = np.zeros(spec.seq_length, np.float32)
    begin = 0
    for ids, mask in samples:
        end = begin + len(ids)
        row["tokens"][begin:end] = ids
        row["labels"][begin : end - 1] = ids[1:]  # what follows its last token is another's
        row["position_ids"][begin:end] = np.arange(len(ids))
        row["starts"][begin:end] = begin
        learned = np.asarray(mask[1:], np.float32)
        row["loss_mask"][begin : end - 1] = learned / learned.sum() if spec.loss_per == "sequence" else learned
        begin = end
    return {name: torch.from_numpy(values) for name, values in row.items()}
