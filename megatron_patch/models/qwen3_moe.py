"""Qwen3-MoE: Qwen3-30B-A3B and -235B-A22B: norms of queries and keys, 128 small experts and no shared one."""

from __future__ import annotations

from dataclasses import replace

from megatron_patch.family import only
from megatron_patch.models.mixtral import around_mlp, mixture
from megatron_patch.models.qwen2_moe import QWEN2_MOE
from megatron_patch.models.qwen3 import QWEN3

QWEN3_MOE = replace(
    QWEN3,
    name="qwen3-moe",
    models="Qwen3-30B-A3B, 235B-A22B",
    hf_types=("qwen3_moe",),
    special="RMSNorm of each head's queries and keys; 128 small experts, the best 8; some layers may be dense",
    config={
        **{name: source for name, source in QWEN2_MOE.config.items() if "shared" not in name},
        "add_qkv_bias": QWEN3.config["add_qkv_bias"],
        # As transformers writes it, and as it was published.
        "num_moe_experts": lambda hf: hf.get("num_local_experts") or hf["num_experts"],
    },
    fixed={**QWEN3.fixed, "moe_router_dtype": "fp32"},
    inert={
        **QWEN2_MOE.inert,
        **only(False, "qkv_bias", "shared_expert_intermediate_size"),  # 0: there is none
        **only(True, "use_qk_norm"),
    },
    weights=(*around_mlp(QWEN3), *mixture()),
)
