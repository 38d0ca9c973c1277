"""Mistral: Llama whose queries see a window of keys, on every layer (Jiang et al. 2023, section 2)."""

from __future__ import annotations

from dataclasses import replace

from megatron_patch.family import HFConfig, only
from megatron_patch.models.llama import LLAMA


def window(hf: HFConfig) -> tuple[int, int] | None:
    """On every layer: these configs have no field that would choose some."""
    size = hf.get("sliding_window") if "sliding_window" in hf else 4096
    return (size - 1, 0) if size else None


MISTRAL = replace(
    LLAMA,
    name="mistral",
    models="Mistral 7B, Nemo",
    hf_types=("mistral",),
    special="sliding window on every layer",
    config={
        **{name: source for name, source in LLAMA.config.items() if name != "add_qkv_bias"},
        "num_query_groups": "num_key_value_heads",
        "window_size": window,
    },
    swaps=(),
    inert={
        **only(False, "mlp_bias", "attention_bias"),
        "layer_types": lambda value: len(set(value)) == 1,  # sliding_window is what counts
    },
)
