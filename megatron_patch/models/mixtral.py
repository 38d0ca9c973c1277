"""Mixtral: Llama whose MLPs are mixtures of experts, each token sent to its best few.

`mixture` has the rules of the later families whose experts are published under the dense MLP's names.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_patch.family import Family, anything, only, rope_from_config
from megatron_patch.models.llama import H, M
from megatron_patch.models.mistral import MISTRAL
from megatron_patch.weights import Copy, Rule, Stack

EXPERT, HF_EXPERT = M + "mlp.experts.local_experts.*.", H + "block_sparse_moe.experts.*."


def around_mlp(family: Family) -> tuple[Rule, ...]:
    """Its rules for all but the MLPs."""
    return tuple(rule for rule in family.weights if ".mlp." not in rule.internal)


def mixture(m: str = M, h: str = H, shared: str = "shared_experts") -> tuple[Rule, ...]:
    """Rules of the MLP of a layer, in the decoder or elsewhere: a dense one, or experts with or without shared ones."""
    mlps = {
        m + "mlp.": h + "mlp.",
        m + "mlp.shared_experts.": f"{h}mlp.{shared}.",
        m + "mlp.experts.local_experts.*.": h + "mlp.experts.*.",
    }
    return (
        Copy(m + "mlp.router.weight", h + "mlp.gate.weight"),
        *(Stack(a + "linear_fc1.weight", b + "gate_proj.weight", b + "up_proj.weight") for a, b in mlps.items()),
        *(Copy(a + "linear_fc2.weight", b + "down_proj.weight") for a, b in mlps.items()),
    )


MIXTRAL = replace(
    MISTRAL,
    name="mixtral",
    models="Mixtral 8x7B, 8x22B",
    hf_types=("mixtral",),
    special="8 experts, the best 2 by softmax",
    config={
        **MISTRAL.config,
        "layernorm_epsilon": lambda hf: hf.get("rms_norm_eps", 1e-5),
        "num_moe_experts": "num_local_experts",
        "moe_router_topk": "num_experts_per_tok",
        "moe_ffn_hidden_size": "intermediate_size",
    },
    rope=lambda hf: rope_from_config(hf, default_theta=1e6),
    # transformers adds the auxiliary loss with output_router_logits only.
    inert={**only(False, "output_router_logits", "router_jitter_noise"), **anything("router_aux_loss_coef")},
    weights=(
        *around_mlp(MISTRAL),
        Copy(M + "mlp.router.weight", H + "block_sparse_moe.gate.weight"),
        Stack(EXPERT + "linear_fc1.weight", HF_EXPERT + "w1.weight", HF_EXPERT + "w3.weight"),
        Copy(EXPERT + "linear_fc2.weight", HF_EXPERT + "w2.weight"),
    ),
)
