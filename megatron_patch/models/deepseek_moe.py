"""DeepSeekMoE 16B: Llama with many small experts beside shared ones, its first layer dense (Dai et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from megatron_patch.family import HFConfig, anything, only
from megatron_patch.models.deepseek import moe_layers
from megatron_patch.models.llama import LLAMA
from megatron_patch.models.mixtral import around_mlp, mixture
from megatron_patch.models.qwen2_moe import QWEN2_MOE


def _shared_width(hf: HFConfig) -> int | None:
    return hf.get("n_shared_experts", 0) * hf["moe_intermediate_size"] or None


DEEPSEEK_MOE = replace(
    LLAMA,
    name="deepseek-moe",
    models="DeepSeekMoE 16B",
    hf_types=("deepseek",),
    special="64 small experts, the best 6, and shared ones; first layer dense",
    reference="tests/reference/deepseek_moe.py",
    config={
        **LLAMA.config,
        "num_moe_experts": "n_routed_experts",
        "moe_layer_freq": moe_layers,
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_shared_expert_intermediate_size": _shared_width,
        "moe_router_topk": "num_experts_per_tok",
        "moe_router_pre_softmax": QWEN2_MOE.config["moe_router_pre_softmax"],
    },
    fixed={**LLAMA.fixed, "moe_router_dtype": "fp32"},
    swaps=tuple(swap for swap in LLAMA.swaps if swap.at.startswith("self_attention.")),
    inert={
        **only("softmax", "scoring_func"),
        **anything("pretraining_tp"),  # slices a product without changing it
        **anything("aux_loss_alpha", "seq_aux"),  # of the balance loss, which changes no logit
    },
    weights=(*around_mlp(LLAMA), *mixture()),
)
