"""Qwen2-MoE: Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B: many small experts beside a gated shared one; some layers dense."""

from __future__ import annotations

from dataclasses import replace

from megatron_patch.family import HFConfig, only
from megatron_patch.models.llama import LLAMA, WINDOW_FIELDS, H, M
from megatron_patch.models.mixtral import MIXTRAL, around_mlp, mixture
from megatron_patch.weights import Copy


def _moe_layers(hf: HFConfig) -> list[int]:
    dense, every = hf.get("mlp_only_layers", []), hf.get("decoder_sparse_step", 1)
    return [int(layer not in dense and (layer + 1) % every == 0) for layer in range(hf["num_hidden_layers"])]


QWEN2_MOE = replace(
    LLAMA,
    name="qwen2-moe",
    models="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    hf_types=("qwen2_moe",),
    special="60 small experts, the best 4, and a shared one behind a sigmoid gate; some layers dense",
    config={
        **LLAMA.config,
        "num_query_groups": "num_key_value_heads",
        "add_qkv_bias": lambda hf: hf.get("qkv_bias", True),
        "num_moe_experts": "num_experts",
        "moe_layer_freq": _moe_layers,
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
        "moe_router_topk": "num_experts_per_tok",
        # The weights of the chosen add up to 1, or to what they have of all experts' softmax.
        "moe_router_pre_softmax": lambda hf: not hf.get("norm_topk_prob", False),
    },
    fixed={**LLAMA.fixed, "moe_shared_expert_gate": True, "moe_router_dtype": "fp32"},
    swaps=(),
    inert={
        **{name: MIXTRAL.inert[name] for name in ("output_router_logits", "router_aux_loss_coef")},
        **WINDOW_FIELDS,
        **only(False, "use_sliding_window", "use_mrope"),
    },
    weights=(
        *around_mlp(LLAMA),
        *mixture(shared="shared_expert"),
        Copy(M + "mlp.shared_experts.gate_weight", H + "mlp.shared_expert_gate.weight"),
    ),
)
