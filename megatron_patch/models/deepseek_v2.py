"""DeepSeek-V2 and V2-Lite: latent attention as in V3, experts behind a softmax router, in groups or not."""

from __future__ import annotations

from dataclasses import replace

from megatron_patch.family import HFConfig, Swap, only
from megatron_patch.models.deepseek import DEEPSEEK, grouped

_METHODS = ("greedy", "group_limited_greedy")


def _in_groups(hf: HFConfig) -> bool:
    if (method := hf.get("topk_method", "greedy")) not in _METHODS:
        raise ValueError(f"config.json: topk_method={method!r} is not supported; choose {' or '.join(_METHODS)}")
    return grouped(hf) and method == "group_limited_greedy"


DEEPSEEK_V2 = replace(
    DEEPSEEK,
    name="deepseek-v2",
    models="DeepSeek-V2, V2-Lite, Coder-V2",
    hf_types=("deepseek_v2",),
    required=("q_lora_rank",),
    special="latent attention, softmax router whose groups count by their best expert, shared experts",
    config={
        **{name: source for name, source in DEEPSEEK.config.items() if name != "mtp_num_layers"},
        "moe_router_num_groups": lambda hf: hf["n_group"] if _in_groups(hf) else None,
        "moe_router_group_topk": lambda hf: hf["topk_group"] if _in_groups(hf) else None,
    },
    fixed={
        **DEEPSEEK.fixed,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": True,
        "moe_router_enable_expert_bias": False,
    },
    swaps=(*DEEPSEEK.swaps, Swap("mlp.router", "router.BestExpertRouter", _in_groups)),
    inert={
        **DEEPSEEK.inert,
        **only(False, "mlp_bias", "norm_topk_prob"),
        **only("softmax", "scoring_func"),
    },
    weights=tuple(rule for rule in DEEPSEEK.weights if not rule.internal.startswith("mtp.")),
    repeated_weights={},
)
