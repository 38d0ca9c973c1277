"""Which ranks of a legacy checkpoint hold what of an internal tensor, and under which key.

`Ranks` is one layout of one model, bound to a naming scheme: pure arithmetic, for writing and for reading alike. It
knows no disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from megatron_patch.checkpoint.naming import Naming, numbers_of
from megatron_patch.checkpoint.sharding import (
    Chunk,
    Layout,
    Pipeline,
    blocks,
    cut_replicated,
    join,
    join_replicated,
    pad_rows,
    replicated_rows,
)
from megatron_patch.checkpoint.whole import WholeModel
from megatron_patch.family import EMBEDDING
from megatron_patch.model import padded_vocab_size

_EXPERT = ".local_experts."
_LAYERS = "decoder.layers."
_DIVISORS = (128, 64, 32, 16, 8, 4, 2, 1)
"""What people pad a vocabulary by, times the tensor parallel size; the first is Megatron's own."""


class Rank(NamedTuple):
    """Whose file it is."""

    tensor: int
    stage: int
    expert: int


class Place(NamedTuple):
    """One copy of one piece of an internal tensor."""

    piece: int
    rank: Rank
    slot: str
    """The tensor's keys in the file, joined by ``/``."""


class Home(NamedTuple):
    """The stage that holds a tensor or a copy of it, and where in its files."""

    stage: int
    expert: int | None
    """The expert-parallel rank; None: all of them."""

    slot: str


def folder_of(rank: Rank, stages: int, experts: int) -> str:
    """Megatron-LM's name for the directory of a rank, of so many stages and expert-parallel ranks."""
    stage = f"_{rank.stage:03d}" if stages > 1 else ""
    expert = f"_{rank.expert:03d}" if experts > 1 else ""
    return f"mp_rank_{rank.tensor:02d}{stage}{expert}"


def rank_pairs(tensor: int, expert: int, expert_tensor: int) -> tuple[tuple[int, int], ...]:
    """The tensor- and expert-parallel ranks that occur together: not all, where the experts are split less."""
    processes = range(math.lcm(tensor, expert_tensor * expert))
    return tuple(sorted({(process % tensor, process // expert_tensor % expert) for process in processes}))


@dataclass(frozen=True)
class Ranks:
    """The ranks of one layout."""

    model: WholeModel
    naming: Naming
    chunks: tuple[Chunk, ...]
    tensor: int
    expert: int
    expert_tensor: int
    vocabulary: int
    """Rows of the embedding, padding included."""

    replicate_kv: bool
    """Whether each of more ranks than query groups has a whole key and value head, rather than a part of one."""

    pairs: tuple[tuple[int, int], ...]
    """Tensor- and expert-parallel ranks that have files."""

    @property
    def stages(self) -> int:
        return max(chunk.stage for chunk in self.chunks) + 1

    @property
    def virtual(self) -> int:
        return len(self.chunks) // self.stages

    def __str__(self) -> str:
        sizes = {
            "TP": self.tensor,
            "PP": self.stages,
            "VPP": self.virtual if self.virtual > 1 else None,
            "EP": self.expert if self.expert > 1 else None,
            "ETP": self.expert_tensor if self.expert_tensor != self.tensor else None,
        }
        return " ".join(f"{name}{size}" for name, size in sizes.items() if size)

    @property
    def layout(self) -> Layout:
        """The layout that these are the ranks of, as a user would ask for it."""
        return Layout(self.tensor, self._pipeline(), self.expert, self.expert_tensor)

    def _pipeline(self) -> Pipeline:
        layers, virtual = self.model.architecture.num_layers, self.virtual if self.virtual > 1 else None
        of_stage = [sum(chunk.layers for chunk in self.chunks if chunk.stage == stage) for stage in range(self.stages)]
        numbers = [Pipeline(self.stages, virtual)]
        if self.stages > 1 and all(of_stage):
            numbers.append(Pipeline(self.stages, virtual, of_stage[0], of_stage[-1]))
        for pipeline in numbers:
            with suppress(ValueError):
                if pipeline.chunks(layers) == self.chunks:
                    return pipeline
        rows = ["t" * chunk.layers for chunk in self.chunks]
        rows[-1] += "m" * (self.model.architecture.config.get("mtp_num_layers") or 0) + "L"
        return Pipeline(self.stages, virtual, layout=f"E{'|'.join(rows)}")

    @property
    def divisible_by(self) -> int:
        """What the vocabulary may have been padded by: the largest number that gives as many rows."""
        size = self.model.architecture.vocab_size
        sizes = (by for by in _DIVISORS if padded_vocab_size(size, self.tensor, by) == self.vocabulary)
        return next(sizes, _DIVISORS[0])

    def __iter__(self) -> Iterator[Rank]:
        return (Rank(t, stage, e) for stage in range(self.stages) for t, e in self.pairs)

    def folder(self, rank: Rank) -> str:
        """The directory of a rank."""
        return folder_of(rank, self.stages, self.expert)

    # ------------------------------------------------------------------------------------------------ tensors -> files

    @cached_property
    def homes(self) -> dict[str, tuple[Home, ...]]:
        """Internal name -> where it lives."""
        return {name: tuple(self._homes_of(name)) for name in self.model.claims}

    def _homes_of(self, name: str) -> Iterator[Home]:
        numbers, expert = numbers_of(name), None
        if _EXPERT in name:
            expert, numbers[-1] = divmod(numbers[-1], self.experts // self.expert)
        if name.startswith(_LAYERS):
            chunks = [self._chunk_of_layer[numbers[0]]]
            numbers[0] -= chunks[0].first
        else:
            chunks = self._ends(name)
        key = self.naming.key(name, numbers, self.model.claims)
        yield from (Home(chunk.stage, expert, f"{self.part(chunk.virtual)}/{key}") for chunk in chunks)
        last = self.chunks[-1]
        if name == EMBEDDING and self.model.architecture.tied and self.stages > 1:
            yield Home(last.stage, None, f"{self.part(last.virtual)}/{self.naming.tied_head}")

    def _ends(self, name: str) -> list[Chunk]:
        first, last = self.chunks[0], self.chunks[-1]
        with_mtp = bool(self.model.architecture.config.get("mtp_num_layers"))
        if name.startswith("embedding."):
            return [first, last] if with_mtp and self.stages > 1 else [first]
        if name.startswith("decoder.") and with_mtp:  # the final norm: megatron-core puts it behind the last layer then
            return [self._chunk_of_layer[self.model.architecture.num_layers - 1]]
        return [last]

    @cached_property
    def _chunk_of_layer(self) -> list[Chunk]:
        return [chunk for chunk in self.chunks for _ in range(chunk.layers)]

    @property
    def experts(self) -> int:
        return self.model.architecture.config.get("num_moe_experts") or 1

    def part(self, virtual: int) -> str:
        """The key of a file under which a model chunk stands."""
        return f"model{virtual}" if self.virtual > 1 else "model"

    def places(self, name: str) -> tuple[Place, ...]:
        """All copies of all pieces of an internal tensor."""
        pieces = self.pieces(name)
        return tuple(
            Place(t % pieces, Rank(t, home.stage, e), home.slot)
            for home in self.homes[name]
            for t, e in self.pairs
            if home.expert in (None, e)
        )

    @cached_property
    def _members(self) -> dict[tuple[int, int | None], list[tuple[str, str]]]:
        found: dict[tuple[int, int | None], list[tuple[str, str]]] = {}
        for name, homes in self.homes.items():
            for home in homes:
                found.setdefault((home.stage, home.expert), []).append((home.slot, name))
        return found

    def members(self, rank: Rank) -> list[tuple[str, str]]:
        """Slot and internal name of everything in a rank's file."""
        both = (self._members.get((rank.stage, expert), []) for expert in (None, rank.expert))
        return [member for members in both for member in members]

    # ----------------------------------------------------------------------------------------------- tensors <-> pieces

    def pieces(self, name: str) -> int:
        """Into how many pieces a tensor is cut."""
        split = self.model.splits[name]
        if split.axis is None:
            return 1
        return self.expert_tensor if split.is_expert else self.tensor

    def replicates(self, name: str) -> bool:
        """Whether pieces of this tensor share rows."""
        return self.replicate_kv and self.model.splits[name].is_qkv

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a piece.

        Raises:
            ValueError: the tensor does not fall into so many.
        """
        split, pieces, shape = self.model.splits[name], self.pieces(name), list(self.model.claims[name].shape)
        if split.is_vocabulary:
            shape[0] = self.vocabulary
        if self.replicates(name):
            shape[0] = replicated_rows(self.model.architecture, pieces)
        elif split.axis is not None:
            if shape[split.axis] % (split.stride * pieces):
                raise ValueError(
                    f"{name} of shape {tuple(shape)} cannot be cut into {pieces} equal pieces along axis {split.axis};"
                    " choose another tensor parallel size"
                )
            shape[split.axis] //= pieces
        return tuple(shape)

    def blocks(self, name: str, tensor: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """The pieces of a whole tensor, each as the blocks that stand one after the other in it."""
        split, pieces = self.model.splits[name], self.pieces(name)
        if self.replicates(name):
            return tuple((piece,) for piece in cut_replicated(tensor, self.model.architecture, pieces))
        return blocks(pad_rows(tensor, self.vocabulary) if split.is_vocabulary else tensor, split, pieces)

    def join(self, name: str, pieces: Sequence[Tensor]) -> Tensor:
        """The whole tensor; the inverse of `blocks`."""
        split = self.model.splits[name]
        if self.replicates(name):
            return join_replicated(pieces, self.model.architecture)
        whole = join(pieces, split)
        return whole[: self.model.claims[name].shape[0]] if split.is_vocabulary else whole
