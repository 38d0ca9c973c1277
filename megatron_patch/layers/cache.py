"""The key-value cache for generation, kept beside the model rather than inside megatron-core's inference context.

Keys are stored after rotation, so a step costs one token however long the context is. Rows of a batch may have texts
of different lengths: they are padded on the left, share their slots, and each row counts positions from its own first
token. So a row's place can be given to another text at any time: its last token comes to lie where those of the others
do. Memory grows by a few slots at a time, and slots that are padding in every row are given up.

Shapes: B rows, H key-value heads on this rank, S new tokens, L slots, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_GROWTH = 64
"""Slots by which memory grows: a copy every so many steps costs less than a step."""


class KVCache:
    """Keys and values of every layer of one pipeline stage, for one batch.

    Args:
        padding_B: how many slots at the start of each row are padding.
    """

    def __init__(self, padding_B: Tensor) -> None:
        self.padding_B = padding_B
        self.length = 0
        """Slots in use, padding included."""
        self.num_slots = 0
        """Slots there is memory for."""
        self._begin = 0  # what lies before is padding in every row
        self._padded = bool(padding_B.any())
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}
        self.context: Any = None
        """The rows' contexts, of a model that reads the beginning of a text as a whole (prefix.Context)."""

        self._new = 0
        self._prompts_B = torch.zeros_like(padding_B)
        self._masks: dict[int | None, Tensor | None] = {}
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None
        self._interleaved = False

    @contextmanager
    def attached(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside, the attention and rotary modules of `model` work on this cache."""
        users = [(module, module.kv_cache) for module in model.modules() if hasattr(module, "kv_cache")]
        for module, _ in users:
            module.kv_cache = self
        try:
            yield
        finally:
            for module, before in users:
                module.kv_cache = before

    @contextmanager
    def step(self, num_new: int) -> Iterator[None]:
        """Let the model, to which the cache is attached, process `num_new` tokens a row."""
        if self.length + num_new > self.num_slots:
            self._move(0, self.length - self._begin + num_new + _GROWTH)
        self._new, self._masks = num_new, {}
        if not self.length:
            self._prompts_B = num_new - self.padding_B
        yield
        self.length += num_new

    def positions_SB(self) -> Tensor:
        """Position of each new token in its own row, from 0 (padding counts as 0)."""
        slots = torch.arange(self.length, self.length + self._new, device=self.padding_B.device)
        return (slots[:, None] - self.padding_B).clamp(min=0)

    def prompt_lengths_B(self) -> Tensor:
        """How many tokens of each row came in its first step."""
        return self._prompts_B

    def set_rotation(self, angles_SBD: Tensor, interleaved: bool = False) -> None:
        """Take the rotary angles of the new positions.

        Args:
            interleaved: channels turn in pairs of neighbours; else each of the first half with one of the second.
        """
        angles = angles_SBD.transpose(0, 1)[:, None]
        self._interleaved = interleaved
        self._cos, sin = angles.cos(), angles.sin()
        sign = torch.ones(angles.shape[-1], device=sin.device)
        sign[slice(None, None, 2) if interleaved else slice(angles.shape[-1] // 2)] = -1
        self._sin = sin * sign

    def rotate(self, states_BHSD: Tensor) -> Tensor:
        """Rotate queries or keys as megatron-core does, ``x cos + (-x2, x1) sin``; cos and sin are made once a step."""
        if self._cos is None or self._sin is None:
            return states_BHSD
        if self._cos.dtype != states_BHSD.dtype:
            self._cos, self._sin = self._cos.to(states_BHSD.dtype), self._sin.to(states_BHSD.dtype)
        dim = self._cos.shape[-1]
        if dim < states_BHSD.shape[-1]:
            return torch.cat((self._turn(states_BHSD[..., :dim]), states_BHSD[..., dim:]), dim=-1)
        return self._turn(states_BHSD)

    def _turn(self, states_BHSD: Tensor) -> Tensor:
        if self._interleaved:
            partners = states_BHSD.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            partners = states_BHSD.roll(self._cos.shape[-1] // 2, -1)
        return torch.addcmul(states_BHSD * self._cos, partners, self._sin)

    def update(self, layer: int, key_BHSD: Tensor, value_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer; returns all that rows may attend to, [B, H, L, D]."""
        if layer not in self._memory:
            self._memory[layer] = self._blank(key_BHSD), self._blank(value_BHSD)
        begin, end = self._begin, self.length + self._new
        key, value = self._memory[layer]
        key[:, :, self.length : end] = key_BHSD
        value[:, :, self.length : end] = value_BHSD
        return key[:, :, begin:end], value[:, :, begin:end]

    def mask(self, window: int | None = None) -> Tensor | None:
        """Which slots the new tokens may attend to, [B, 1, S, L], or None where the causal rule alone decides.

        Args:
            window: how many slots back at most, the token's own included.
        """
        if window not in self._masks:
            self._masks[window] = self._attention_mask(self._new, window)
        return self._masks[window]

    # ------------------------------------------------------------------------------------------- rows that come and go

    def reorder(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, in this order."""
        self.padding_B, self._prompts_B = self.padding_B[rows], self._prompts_B[rows]
        self.context = self.context and self.context.rows(rows)
        self._memory = {layer: (key[rows], value[rows]) for layer, (key, value) in self._memory.items()}
        self._settle()

    def release(self, rows: Tensor) -> None:
        """Forget the texts of these rows: what they hold is padding, until `put` gives them another."""
        self.padding_B[rows] = self.length
        self._settle()

    def put(self, rows: Tensor, other: KVCache, theirs: Tensor) -> None:
        """Give these rows the texts of some rows of another cache, which loses its memory by that.

        All texts end in the same slot from then on. The rows of an empty cache are all free.
        """
        if other.length > self.length:
            self._move(other.length - (self.length - self._begin), other.length + _GROWTH)
        shift = self.length - other.length
        for layer in [*other._memory]:
            pair = other._memory.pop(layer)
            if layer not in self._memory:
                self._memory[layer] = tuple(map(self._blank, pair))
            for to, text in zip(self._memory[layer], pair, strict=True):
                to[rows, :, shift : self.length] = text[theirs, :, : other.length]
        self.padding_B[rows] = other.padding_B[theirs] + shift
        self._prompts_B[rows] = other._prompts_B[theirs]
        if other.context is not None:
            if self.context is None:
                self.context = other.context.rows(torch.zeros_like(self.padding_B))
            self.context.put(rows, other.context.rows(theirs))
        self._settle()

    def _settle(self) -> None:
        """Look at what is padding, after it changed."""
        self._begin = min(int(self.padding_B.min()), self.length)
        self._padded = bool((self.padding_B > self._begin).any())

    def _move(self, start: int, num_slots: int) -> None:
        """Move to new memory, in which what is in use begins at slot `start`."""
        first, self.num_slots = self._begin, num_slots
        for layer, pair in self._memory.items():
            moved = tuple(map(self._blank, pair))
            for to, text in zip(moved, pair, strict=True):
                to[:, :, start : start + self.length - first] = text[:, :, first : self.length]
            self._memory[layer] = moved
        self.padding_B = self.padding_B + (start - first)
        self.length, self._begin = self.length + start - first, start

    def _blank(self, like_BHSD: Tensor) -> Tensor:
        # Zeros, not whatever was in memory: what is masked counts 0 times, and 0 times NaN is NaN.
        return like_BHSD.new_zeros(len(self.padding_B), like_BHSD.shape[1], self.num_slots, like_BHSD.shape[3])

    def _attention_mask(self, num_new: int, window: int | None) -> Tensor | None:
        end = self.length + num_new
        inside = window is None or end - self._begin <= window
        # One new token may see all slots, and a first chunk is plainly causal: without padding neither needs a mask.
        plain = self.length == 0 and self.context is None
        if not self._padded and inside and (num_new == 1 or plain):
            return None
        query = torch.arange(self.length, end, device=self.padding_B.device)[:, None]
        key = torch.arange(self._begin, end, device=self.padding_B.device)[None]
        real = key >= self.padding_B[:, None, None]
        # Padding attends to itself: a row without any key would turn into NaN and spoil the values others read.
        near = key <= query if inside else (key <= query) & (key > query - window)
        if self.context is not None:
            near = near | (key < (self.padding_B + self.context.length_B)[:, None, None])
        return (near & (real | (key == query)))[:, None]
