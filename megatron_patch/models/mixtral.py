"""Mixtral: Llama whose MLPs are mixtures of experts, each token sent to its best few."""

from __future__ import annotations

from dataclasses import replace

from megatron_patch.family import rope_from_config
from megatron_patch.models.llama import LLAMA, H, M
from megatron_patch.weights import Copy, Stack

EXPERT, HF_EXPERT = M + "mlp.experts.local_experts.*.", H + "block_sparse_moe.experts.*."

MIXTRAL = replace(
    LLAMA,
    name="mixtral",
    hf_types=("mixtral",),
    config={
        **LLAMA.config,
        "num_moe_experts": "num_local_experts",
        "moe_router_topk": "num_experts_per_tok",
        "moe_ffn_hidden_size": "intermediate_size",
    },
    rope=lambda hf: rope_from_config(hf, default_theta=1e6),
    swaps=(),
    inert={
        "output_router_logits": lambda value: value is False,
        "router_aux_loss_coef": lambda value: True,  # transformers adds the loss with output_router_logits only
        "router_jitter_noise": lambda value: value == 0,
    },
    weights=(
        *(rule for rule in LLAMA.weights if ".mlp." not in rule.internal),
        Copy(M + "mlp.router.weight", H + "block_sparse_moe.gate.weight"),
        Stack(EXPERT + "linear_fc1.weight", HF_EXPERT + "w1.weight", HF_EXPERT + "w3.weight"),
        Copy(EXPERT + "linear_fc2.weight", HF_EXPERT + "w2.weight"),
    ),
)
