"""The key-value cache for generation, kept beside the model rather than inside megatron-core's inference context.

Keys are stored after rotation, so a step costs one token however long the context is. Rows of a batch may have prompts
of different lengths: they are padded on the left, share their slots, and each row counts positions from its own first
token.

Shapes: B rows, H key-value heads on this rank, S new tokens, L slots, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer of one pipeline stage, for one batch.

    Args:
        padding_B: how many slots at the start of each row are padding.
        num_slots: the largest number of tokens a row will hold, padding included.
    """

    def __init__(self, padding_B: Tensor, num_slots: int) -> None:
        self.padding_B = padding_B
        self.num_slots = num_slots
        self.length = 0
        self._slots = torch.arange(num_slots, device=padding_B.device)
        self._padded = bool(padding_B.any())
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}
        self.context: Any = None
        """The rows' contexts, of a model that reads the beginning of a text as a whole (prefix.Context)."""

        self._new = self._first = 0
        self._masks: dict[int | None, Tensor | None] = {}
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None
        self._interleaved = False

    @contextmanager
    def attached(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside, the attention and rotary modules of `model` work on this cache."""
        users = [module for module in model.modules() if hasattr(module, "kv_cache")]
        for module in users:
            module.kv_cache = self
        try:
            yield
        finally:
            for module in users:
                module.kv_cache = None

    @contextmanager
    def step(self, num_new: int) -> Iterator[None]:
        """Let the model, to which the cache is attached, process `num_new` tokens a row."""
        if self.length + num_new > self.num_slots:
            raise ValueError(
                f"the cache has {self.num_slots} slots; {self.length} are used and {num_new} more are asked for"
            )
        self._new, self._masks = num_new, {}
        if not self.length:
            self._first = num_new
        yield
        self.length += num_new

    def positions_SB(self) -> Tensor:
        """Position of each new token in its own row, from 0 (padding counts as 0)."""
        slots = self._slots[self.length : self.length + self._new]
        return (slots[:, None] - self.padding_B).clamp(min=0)

    def prompt_lengths_B(self) -> Tensor:
        """How many tokens of each row came in the first step."""
        return self._first - self.padding_B

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
        """Store the new keys and values of a layer; returns all so far, [B, H, length, D]."""
        if layer not in self._memory:
            self._memory[layer] = tuple(
                new.new_empty((*new.shape[:2], self.num_slots, new.shape[3])) for new in (key_BHSD, value_BHSD)
            )
        end = self.length + self._new
        key, value = self._memory[layer]
        key[:, :, self.length : end] = key_BHSD
        value[:, :, self.length : end] = value_BHSD
        return key[:, :, :end], value[:, :, :end]

    def mask(self, window: int | None = None) -> Tensor | None:
        """Which slots the new tokens may attend to, [B, 1, S, length], or None where the causal rule alone decides.

        Args:
            window: how many slots back at most, the token's own included.
        """
        if window not in self._masks:
            self._masks[window] = self._attention_mask(self._new, window)
        return self._masks[window]

    def reorder(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, in this order."""
        self.padding_B = self.padding_B[rows]
        self.context = self.context and self.context.rows(rows)
        self._memory = {layer: (k[rows], v[rows]) for layer, (k, v) in self._memory.items()}

    def _attention_mask(self, num_new: int, window: int | None) -> Tensor | None:
        inside = window is None or self.length + num_new <= window
        # One new token may see all slots, and a first chunk is plainly causal: without padding neither needs a mask.
        plain = self.length == 0 and self.context is None
        if not self._padded and inside and (num_new == 1 or plain):
            return None
        query = self._slots[self.length : self.length + num_new, None]
        key = self._slots[None, : self.length + num_new]
        real = key >= self.padding_B[:, None, None]
        # Padding attends to itself: a row without any key would turn into NaN and spoil the values others read.
        near = key <= query if inside else (key <= query) & (key > query - window)
        if self.context is not None:
            near = near | (key < (self.padding_B + self.context.length_B)[:, None, None])
        return (near & (real | (key == query)))[:, None]
