"""DeepSeek-V3 (R1, Moonlight): multi-head latent attention, experts behind a sigmoid router, multi-token prediction.

DeepSeek-AI 2024, "DeepSeek-V3 Technical Report".
"""

from __future__ import annotations

from megatron_patch.family import Family, HFConfig, anything, only
from megatron_patch.models.latent import LATENT, LATENT_FIXED, LATENT_SWAPS, around_mlp
from megatron_patch.models.mixtral import mixture
from megatron_patch.weights import Copy, Rule


def moe_layers(hf: HFConfig) -> list[int]:
    """Which layers are mixtures of experts."""
    first, every = hf.get("first_k_dense_replace", 0), hf.get("moe_layer_freq", 1)
    return [int(layer >= first and layer % every == 0) for layer in range(hf["num_hidden_layers"])]


def grouped(hf: HFConfig) -> bool:
    """Whether some groups of experts are left out, so that it matters how groups are chosen."""
    return hf.get("topk_group", 1) < hf.get("n_group", 1)


def _group_topk(hf: HFConfig) -> int | None:
    if not grouped(hf):
        return None
    groups, experts = hf["topk_group"], hf["num_experts_per_tok"]
    if experts != 2 * groups:  # a group's score is the sum of its best two here, of its best experts / groups in core
        raise ValueError(f"config.json: num_experts_per_tok={experts} must be twice topk_group={groups}")
    return groups


def _quantized(hf: HFConfig) -> str:
    if not (quantization := hf.get("quantization_config")):
        return ""
    return (
        f"config.json: quantization_config says that the weights are in {quantization.get('quant_method')}; cast them "
        "to bfloat16 first, with DeepSeek's own script, and take quantization_config out"
    )


def _layer(m: str, h: str) -> tuple[Rule, ...]:
    return (
        *around_mlp(m, h),
        *mixture(m, h),
        Copy(m + "mlp.router.expert_bias", h + "mlp.gate.e_score_correction_bias"),
    )


_MTP, _HF_MTP = "mtp.layers.*.", "model.layers.+*."

DEEPSEEK = Family(
    name="deepseek",
    models="DeepSeek-V3, R1, Moonlight",
    hf_types=("deepseek_v3",),
    special="latent attention, sigmoid router with bias and groups, shared experts, multi-token prediction",
    required=("q_lora_rank", "n_group", "topk_group", "first_k_dense_replace", "num_nextn_predict_layers"),
    config={
        **LATENT,
        # experts
        "num_moe_experts": "n_routed_experts",
        "moe_layer_freq": moe_layers,
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_shared_expert_intermediate_size": lambda hf: hf["moe_intermediate_size"] * hf["n_shared_experts"],
        "moe_router_topk": "num_experts_per_tok",
        "moe_router_num_groups": lambda hf: hf["n_group"] if grouped(hf) else None,
        "moe_router_group_topk": _group_topk,
        "moe_router_topk_scaling_factor": "routed_scaling_factor",
        # multi-token prediction
        "mtp_num_layers": lambda hf: hf.get("num_nextn_predict_layers", 0) or None,
    },
    fixed={
        **LATENT_FIXED,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
    },
    swaps=LATENT_SWAPS,
    inert={
        **only(False, "attention_bias", "output_router_logits"),
        **only(True, "norm_topk_prob", "rope_interleave"),
        **only("sigmoid", "scoring_func"),
        **only("noaux_tc", "topk_method"),
        **anything("qk_head_dim", "ep_size", "pretraining_tp"),  # derived by transformers; layouts
        **anything("aux_loss_alpha", "seq_aux"),  # of the balance loss, which changes no logit
    },
    weights=(
        Copy("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        *_layer("decoder.layers.*.", "model.layers.*."),
        *(Copy(_MTP + f"{norm}.weight", _HF_MTP + f"{norm}.weight") for norm in ("enorm", "hnorm")),
        Copy(_MTP + "eh_proj.weight", _HF_MTP + "eh_proj.weight"),
        # megatron-core 0.16 calls it by the first name, 0.19 by the second.
        *(rule for name in ("transformer_layer", "mtp_model_layer") for rule in _layer(f"{_MTP}{name}.", _HF_MTP)),
        Copy(_MTP + "final_layernorm.weight", _HF_MTP + "shared_head.norm.weight"),
        Copy("decoder.final_layernorm.weight", "model.norm.weight"),
        Copy("output_layer.weight", "lm_head.weight"),
    ),
    ignored_weights=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    tied_weights=("lm_head.weight",),
    repeated_weights={
        _HF_MTP + "embed_tokens.weight": "model.embed_tokens.weight",
        _HF_MTP + "shared_head.head.weight": "lm_head.weight",
    },
    quantized=_quantized,
)
