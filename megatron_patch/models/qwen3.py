"""Qwen3: Llama with a norm on each head's queries and keys, and a size of heads of its own (Qwen Team 2025)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_patch.family import HFConfig
from megatron_patch.models.llama import LLAMA, WINDOW, WINDOW_FIELDS, H, M
from megatron_patch.weights import Copy


def _if_used(source: Callable[[HFConfig], Any]) -> Callable[[HFConfig], Any]:
    """A window counts only where `use_sliding_window` says so, and then nothing about it may be left open."""

    def value(hf: HFConfig) -> Any:
        used = hf.get("use_sliding_window", False) and hf["sliding_window"] and hf["max_window_layers"] is not None
        return source(hf) if used else None

    return value


QWEN3 = replace(
    LLAMA,
    name="qwen3",
    models="Qwen3",
    hf_types=("qwen3",),
    special="RMSNorm of each head's queries and keys, head size of its own; later layers may have a sliding window",
    config={
        **LLAMA.config,
        **{name: _if_used(source) for name, source in WINDOW.items()},
        "num_query_groups": "num_key_value_heads",
        "kv_channels": lambda hf: hf.get("head_dim", 128),
    },
    fixed={**LLAMA.fixed, "qk_layernorm": True},
    swaps=tuple(
        swap for swap in LLAMA.swaps if swap.at.startswith("self_attention.")
    ),  # attention_bias, and no mlp_bias
    inert=WINDOW_FIELDS,
    weights=(
        *LLAMA.weights,
        *(Copy(M + f"self_attention.{x}_layernorm.weight", H + f"self_attn.{x}_norm.weight") for x in "qk"),
    ),
)
