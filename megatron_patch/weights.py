"""Reversible weight rules: how Hugging Face tensors become internal tensors, and back.

An *internal* tensor carries megatron-core's local parameter name, whole (TP1 PP1 EP1) and without vocabulary padding.
A rule names one internal tensor and the Hugging Face tensors it is made of; ``*`` stands for a running number (of a
layer, of an expert), and ``+*`` in a Hugging Face name for one that counts on after the decoder's layers. Both
directions are written on the rule, so the other half of a weight map is never maintained by hand. `claim` matches rules
with the parameters that a model really has: every parameter must be claimed by exactly one rule.

This file knows tensors and names only: no families, no megatron, no disk, no ranks.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Heads(Protocol):
    """The attention geometry that rules for fused projections need."""

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int


@dataclass(frozen=True)
class Rule(ABC):
    """One internal tensor and the Hugging Face tensors it is made of."""

    internal: str
    """Internal name, ``*`` for each running number."""

    hf: tuple[str, ...]
    """Hugging Face names in the order the rule wants them, with as many ``*`` or ``+*``."""

    def __init__(self, internal: str, *hf: str) -> None:
        object.__setattr__(self, "internal", internal)
        object.__setattr__(self, "hf", hf)

    @abstractmethod
    def to_internal(self, tensors: Sequence[Tensor], heads: Heads) -> Tensor:
        """The internal tensor from those named by `hf`, in that order."""

    @abstractmethod
    def to_hf(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        """The Hugging Face tensors from the internal one; works on the meta device, where it tells their shapes."""


class Copy(Rule):
    """The same tensor under another name."""

    def to_internal(self, tensors: Sequence[Tensor], heads: Heads) -> Tensor:
        (tensor,) = tensors
        return tensor

    def to_hf(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return (tensor,)


def copies(
    places: Mapping[str, str], ours: str = "", theirs: str = "", parts: Iterable[str] = ("weight", "bias")
) -> tuple[Copy, ...]:
    """A `Copy` for each parameter of some modules.

    Args:
        places: internal module -> Hugging Face module.
        ours, theirs: what stands before their names.
    """
    return tuple(Copy(f"{ours}{a}.{w}", f"{theirs}{b}.{w}") for a, b in places.items() for w in parts)


class QKV(Rule):
    """Separate Q, K, V projections (weights or biases) merged per query group.

    With G groups, R = query heads a group and head size D, megatron-core wants G x (R + 2) x D rows: for each group its
    R query heads, then its key, then its value. This is the one place that knows that interleave.
    """

    def to_internal(self, tensors: Sequence[Tensor], heads: Heads) -> Tensor:
        rest = tensors[0].shape[1:]
        grouped = [t.reshape(heads.num_query_groups, -1, heads.kv_channels, *rest) for t in tensors]
        return torch.cat(grouped, dim=1).reshape(-1, *rest)

    def to_hf(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        rest = tensor.shape[1:]
        queries = heads.num_attention_heads // heads.num_query_groups
        grouped = tensor.reshape(heads.num_query_groups, queries + 2, heads.kv_channels, *rest)
        return tuple(part.reshape(-1, *rest) for part in grouped.split([queries, 1, 1], dim=1))


class StackedQKV(QKV):
    """One projection that holds all queries, then all keys, then all values."""

    def to_internal(self, tensors: Sequence[Tensor], heads: Heads) -> Tensor:
        (tensor,) = tensors
        keys = heads.num_query_groups * heads.kv_channels
        return super().to_internal(tensor.split([len(tensor) - 2 * keys, keys, keys]), heads)

    def to_hf(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return (torch.cat(super().to_hf(tensor, heads)),)


class Stack(Rule):
    """Equal parts stacked along the first axis, such as gate over up."""

    def to_internal(self, tensors: Sequence[Tensor], heads: Heads) -> Tensor:
        return torch.cat(list(tensors))

    def to_hf(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return tensor.chunk(len(self.hf))


class Exchanged(Rule):
    """One tensor of two parts that stand the other way round, such as up over gate."""

    def to_internal(self, tensors: Sequence[Tensor], heads: Heads) -> Tensor:
        (tensor,) = tensors
        return torch.cat(tensor.chunk(2)[::-1])

    def to_hf(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return (torch.cat(tensor.chunk(2)[::-1]),)


@dataclass(frozen=True)
class Transposed(Rule):
    """Another rule, for matrices that are stored with inputs before outputs."""

    rule: Rule
    """The rule for those matrices, transposed."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule.internal, *rule.hf)
        object.__setattr__(self, "rule", rule)

    def to_internal(self, tensors: Sequence[Tensor], heads: Heads) -> Tensor:
        return self.rule.to_internal([tensor.T for tensor in tensors], heads)

    def to_hf(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return tuple(part.T for part in self.rule.to_hf(tensor, heads))


@dataclass(frozen=True)
class TwoAxes(Rule):
    """Another rule for queries, keys and values, of heads whose halves turn with two different positions.

    Published, each half of a head [A | B] is rotated by itself, [A1 A2 | B1 B2]; megatron-core rotates a head whole,
    [A1 B1 | A2 B2]. Exchanging A2 and B1 in queries and keys alike leaves their products as they are; it undoes itself.
    """

    rule: Rule
    """The rule for the projection with its channels as published."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule.internal, *rule.hf)
        object.__setattr__(self, "rule", rule)

    def to_internal(self, tensors: Sequence[Tensor], heads: Heads) -> Tensor:
        return self._exchange(self.rule.to_internal(tensors, heads), heads)

    def to_hf(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return self.rule.to_hf(self._exchange(tensor, heads), heads)

    @staticmethod
    def _exchange(tensor: Tensor, heads: Heads) -> Tensor:
        rest = tensor.shape[1:]
        grouped = tensor.reshape(heads.num_query_groups, -1, heads.kv_channels, *rest)
        turned = grouped[:, :-1].unflatten(2, (2, 2, heads.kv_channels // 4)).transpose(2, 3).flatten(2, 4)
        return torch.cat((turned, grouped[:, -1:]), dim=1).reshape(-1, *rest)


@dataclass(frozen=True)
class Claim:
    """A rule bound to one internal tensor: the running numbers are filled in."""

    name: str
    """The internal tensor's name."""

    hf: tuple[str, ...]
    """The Hugging Face tensors it is made of."""

    rule: Rule
    """How."""

    shape: tuple[int, ...]
    """The internal tensor's shape."""

    def hf_shapes(self, heads: Heads) -> tuple[tuple[int, ...], ...]:
        """The shape each Hugging Face tensor must have, derived from the internal one."""
        return tuple(tuple(t.shape) for t in self.rule.to_hf(torch.empty(self.shape, device="meta"), heads))


def claim(
    rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]], num_layers: int | None = None
) -> tuple[Claim, ...]:
    """Bind rules to a model's internal tensors, in the model's order.

    Args:
        rules: a family's rules; those without a tensor in this model (say, biases it does not have) stay unused.
        shapes: internal name -> shape, for every parameter of the model.
        num_layers: of the decoder; needed where a rule counts on after them.

    Raises:
        ValueError: a parameter that no rule or more than one rule claims, or a Hugging Face tensor claimed twice.
    """
    by_name: dict[str, list[Rule]] = {}
    for rule in rules:
        by_name.setdefault(rule.internal, []).append(rule)
    claims = tuple(_claim_one(name, tuple(shape), by_name, num_layers) for name, shape in shapes.items())
    owner: dict[str, str] = {}
    for one in claims:
        for source in one.hf:
            if owner.setdefault(source, one.name) != one.name:
                raise ValueError(f"Hugging Face tensor {source} is claimed by both {owner[source]} and {one.name}")
    return claims


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_PLACE = re.compile(r"(\+?)\*")


def _claim_one(name: str, shape: tuple[int, ...], by_name: Mapping[str, list[Rule]], num_layers: int | None) -> Claim:
    numbers = _NUMBER.findall(name)
    hits = [*by_name.get(_NUMBER.sub("*", name), ()), *(by_name.get(name, ()) if numbers else ())]
    if len(hits) != 1:
        claimants = ", ".join(rule.internal for rule in hits) or "none"
        raise ValueError(f"parameter {name} must be claimed by exactly one weight rule; claimed by: {claimants}")
    return Claim(name, tuple(fill(source, numbers, num_layers) for source in hits[0].hf), hits[0], shape)


def fill(pattern: str, numbers: Iterable[str | int], num_layers: int | None = None) -> str:
    """A name from its pattern: running numbers for ``*``, and for ``+*`` numbers that go on after `num_layers`."""
    remaining = iter(numbers)
    return _PLACE.sub(lambda m: str(int(next(remaining)) + (num_layers if m[1] else 0)), pattern)
