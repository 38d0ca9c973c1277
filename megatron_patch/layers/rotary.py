"""Rotary position embedding with the frequencies that `rope_parameters` of a Hugging Face config ask for.

megatron-core's own knows the default and Llama 3.1's scaling with fixed constants. This one stands in for it on a built
GPTModel, and serves positions of a key-value cache as well. Sources: Su et al. 2021 (default); kaiokendev (linear);
bloc97 and emozilla (dynamic NTK); Qwen (ntk_steps: the same in powers of two); Llama 3.1 (llama3); Peng et al. 2023
(yarn).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_patch.family import Rope
from megatron_patch.layers.cache import KVCache


class Rotary(torch.nn.Module):
    """Angles for each position: what GPTModel hands to its attention layers.

    Args:
        rope: type and parameters.
        dim: channels of a head.
        interleaved: they turn in pairs of neighbours; else each of the first half with one of the second.
    """

    get_rotary_seq_len = RotaryEmbedding.get_rotary_seq_len

    def __init__(self, rope: Rope, dim: int, interleaved: bool = False) -> None:
        super().__init__()
        self.rope, self.dim, self.interleaved = rope, int(dim * rope.fraction) // rope.axes, interleaved
        self.kv_cache: KVCache | None = None
        self.positions_SBA: Tensor | None = None
        """Positions of the tokens that the model is working on, where they are not 0, 1, 2, ... (prefix.py)."""

        self._last: tuple[tuple[int, bool], Tensor] | None = None
        self._constant: Tensor | None = None

    @property
    def num_positions(self) -> int:
        """How many positions the model is meant for: `max_position_embeddings`, times the factor by which the type
        stretches it, unless the config says that it is stretched already (`original_max_position_embeddings`)."""
        p = self.rope.parameters
        stretch = 1.0 if "original_max_position_embeddings" in p else p.get("factor", 1.0)
        return int(self.rope.max_position_embeddings * stretch)

    def forward(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> Tensor | None:
        """Angles [S, 1, 1, dim] of positions 0 to `max_seq_len`, [S, B, 1, dim] where each row has its own; None with a
        cache, which then rotates by itself."""
        if self.kv_cache is not None:
            self.kv_cache.set_rotation(self._angles(self.kv_cache.positions_SB())[:, :, 0], self.interleaved)
            return None
        if self.positions_SBA is not None:
            return self._angles(self.positions_SBA[..., 0])
        key = (max_seq_len, self.training)
        if self._last is None or self._last[0] != key:
            positions = torch.arange(max_seq_len, device=_device())[:, None]
            self._last = (key, self._angles(positions))
        return self._last[1]

    def _angles(self, positions_SB: Tensor) -> Tensor:
        frequencies = self._frequencies(positions_SB)
        if self.positions_SBA is None:
            half = positions_SB[..., None].float() * frequencies
        else:
            half = (self.positions_SBA[..., None].float() * frequencies[..., None, :]).flatten(2)
        whole = half.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((half, half), dim=-1)
        return whole[:, :, None]

    def _frequencies(self, positions_SB: Tensor) -> Tensor:
        """Inverse frequencies [dim / 2]; [B, dim / 2] for types that depend on the length, each row by its own.

        Cached keys keep the frequencies of the step that made them, as in transformers. Unlike there, neither longer
        rows of the batch nor earlier texts matter: every row gets what transformers gives it alone in a fresh model.
        """
        if self.rope.rope_type in BY_LENGTH:
            lengths = self._lengths(positions_SB)
            frequencies = torch.stack([inverse_frequencies(self.rope, self.dim, length) for length in lengths])
            return frequencies.to(positions_SB.device)
        if self._constant is None or self._constant.device != positions_SB.device:
            self._constant = inverse_frequencies(self.rope, self.dim).to(positions_SB.device)
        return self._constant

    def _lengths(self, positions_SB: Tensor) -> list[int]:
        """How long each row is so far. Qwen (ntk_steps) keeps to the prompt, and in training to what it began with."""
        if self.rope.rope_type == "ntk_steps":
            if self.training:
                return [0] * positions_SB.shape[1]
            if self.kv_cache is not None:
                return self.kv_cache.prompt_lengths_B().tolist()
        return (positions_SB[-1] + 1).tolist()


class LatentRotary(torch.nn.Module):
    """megatron-core's rotary embedding inside latent attention, taught the positions of a key-value cache.

    Args:
        inner: core's, of any type.
    """

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.get_rotary_seq_len = inner, inner.get_rotary_seq_len
        self.kv_cache: KVCache | None = None

    def forward(self, max_seq_len: int, **options: Any) -> Any:
        """What core's gives, for positions 0 to `max_seq_len`; with a cache for each row's own, [S, B, 1, dim]."""
        if self.kv_cache is None:
            return self.inner(max_seq_len, **options)
        result = self.inner(self.kv_cache.num_slots, **options)
        angles, *rest = result if isinstance(result, tuple) else (result,)
        chosen = angles[self.kv_cache.positions_SB(), 0]
        return (chosen, *rest) if rest else chosen


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def inverse_frequencies(rope: Rope, dim: int, length: int = 0) -> Tensor:
    """Radians per position of each channel pair, [dim / 2] in fp32; `length` matters to the dynamic type only."""
    return _TYPES[rope.rope_type](rope, dim, length)


def attention_factor(rope: Rope) -> float:
    """What the type multiplies cos and sin with (1 except for yarn: equation 22 and its `mscale` variants)."""
    p = rope.parameters
    if rope.rope_type != "yarn":
        return 1.0
    if p.get("attention_factor") is not None:
        return p["attention_factor"]

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(p["factor"]) + 1.0 if p["factor"] > 1 else 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(p["mscale"]) / mscale(p["mscale_all_dim"])
    return mscale(1.0)


def _default(rope: Rope, dim: int, _length: int, theta: float | None = None) -> Tensor:
    return 1.0 / ((theta or rope.rope_theta) ** (torch.arange(0, dim, 2, dtype=torch.float, device="cpu") / dim))


def _linear(rope: Rope, dim: int, length: int) -> Tensor:
    return _default(rope, dim, length) / rope.parameters["factor"]


def _dynamic(rope: Rope, dim: int, length: int) -> Tensor:
    trained, factor = rope.max_position_embeddings, rope.parameters["factor"]
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return _default(rope, dim, length, rope.rope_theta * stretch ** (dim / (dim - 2)))


def _half(rope: Rope, dim: int, length: int) -> Tensor:
    return _default(rope, dim, length).half().float()  # ChatGLM-6B was trained with frequencies in float16


def _ntk_steps(rope: Rope, dim: int, length: int) -> Tensor:
    steps = math.ceil(math.log2(max(length, 1) / rope.parameters["original_max_position_embeddings"]) + 1)
    return _default(rope, dim, length, rope.rope_theta * max(2**steps - 1, 1) ** (dim / (dim - 2)))


def _llama3(rope: Rope, dim: int, length: int) -> Tensor:
    p = rope.parameters
    frequency = _default(rope, dim, length)
    turns = p["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    # 0 below `low` turns in the trained window (interpolate), 1 above `high` (keep), linear in between.
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / p["factor"] + keep * frequency


def _yarn(rope: Rope, dim: int, length: int) -> Tensor:
    p = rope.parameters
    trained = p.get("original_max_position_embeddings") or rope.max_position_embeddings

    def channel(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = channel(p.get("beta_fast") or 32), channel(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)
    frequency = _default(rope, dim, length)
    return frequency / p["factor"] * ramp + frequency * (1 - ramp)


_TYPES: dict[str, Callable[[Rope, int, int], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "half": _half,
    "llama3": _llama3,
    "yarn": _yarn,
    "ntk_steps": _ntk_steps,
}
BY_LENGTH = ("dynamic", "ntk_steps")
"""Types whose frequencies change with a text's length once it exceeds what the model was trained with."""
