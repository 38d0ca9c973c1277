"""GLM-4 in the two formats of transformers: Llama with half of each head rotated, in pairs of neighbours.

GLM Team 2024. GLM-4-0414 (`glm4`) norms what attention and MLP put out as well. The same models with their own code are
another family's, and other formats.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_patch.family import Swap, rope_from_config
from megatron_patch.models.llama import LLAMA, H, M
from megatron_patch.weights import Copy

GLM = replace(
    LLAMA,
    name="glm",
    models="GLM-4-9B as transformers has it",
    hf_types=("glm",),
    matches=lambda values: "block_position_encoding" not in values,
    special="interleaved partial rotary, few key-value heads, biases of queries, keys and values",
    config={
        **LLAMA.config,
        "num_query_groups": "num_key_value_heads",
        "kv_channels": "head_dim",
        "layernorm_epsilon": "rms_norm_eps",
        "add_qkv_bias": lambda hf: hf.get("attention_bias", True),
    },
    fixed={**LLAMA.fixed, "rotary_interleaved": True},
    rope=lambda hf: rope_from_config(hf, default_fraction=0.5),
    swaps=(),
    inert={},
    weights=(
        *(rule for rule in LLAMA.weights if "linear_fc1" not in rule.internal),
        Copy(M + "mlp.linear_fc1.weight", H + "mlp.gate_up_proj.weight"),
    ),
)

_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")

GLM4 = replace(
    GLM,
    name="glm4",
    models="GLM-4-0414",
    hf_types=("glm4",),
    special="GLM with sandwich norms",
    swaps=(Swap("", "block.SandwichLayer"),),
    weights=(*GLM.weights, *(Copy(M + f"{norm}.weight", H + f"{norm}.weight") for norm in _NORMS)),
)
