"""Qwen2: Qwen1.5, Qwen2, Qwen2.5 and QwQ: Llama whose queries, keys and values have biases."""

from __future__ import annotations

from dataclasses import replace

from megatron_patch.family import only
from megatron_patch.models.llama import LLAMA, WINDOW, WINDOW_FIELDS

QWEN2 = replace(
    LLAMA,
    name="qwen2",
    models="Qwen1.5, 2, 2.5, QwQ",
    hf_types=("qwen2",),
    special="biases of queries, keys and values; later layers may have a sliding window",
    config={
        **LLAMA.config,
        **WINDOW,
        "num_query_groups": "num_key_value_heads",
        "add_qkv_bias": lambda hf: True,
    },
    swaps=(),
    inert={**WINDOW_FIELDS, **only(False, "use_mrope", "mlp_bias", "attention_bias")},
)
