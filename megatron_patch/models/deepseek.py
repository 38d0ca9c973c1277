"""DeepSeek-V3 (and R1): multi-head latent attention, experts behind a sigmoid router, multi-token prediction.

DeepSeek-AI 2024, "DeepSeek-V3 Technical Report". The rotary embedding is the one that megatron-core's latent attention
builds for itself, so its parameters are config fields here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_patch.family import Family, HFConfig, Rope, rope_from_config
from megatron_patch.weights import Copy, Rule, Stack

_ROPE_TYPES = {"default": "rope", "yarn": "yarn"}


def _equal(name: str, other: str) -> Callable[[HFConfig], Any]:
    """The field `name`, which must be what `other` says, if that is given at all."""

    def value(hf: HFConfig) -> Any:
        if hf.get(other, hf[name]) != hf[name]:
            raise ValueError(f"config.json: {other}={hf[other]!r} must equal {name}={hf[name]!r}")
        return hf[name]

    return value


def _rope(hf: HFConfig) -> Rope:
    rope = rope_from_config(hf)
    p = rope.parameters
    if rope.rope_type not in _ROPE_TYPES:
        choices = " or ".join(_ROPE_TYPES)
        raise ValueError(f"config.json: rope_type={rope.rope_type!r} is not supported here; choose {choices}")
    if refused := [name for name in ("attention_factor", "truncate") if name in p]:
        raise ValueError(f"config.json: {refused[0]}={p[refused[0]]!r} of rope_type='yarn' is not supported here")
    if bool(p.get("mscale")) != bool(p.get("mscale_all_dim")):
        raise ValueError("config.json: rope_type='yarn' wants mscale and mscale_all_dim, both or neither")
    return rope


def _yarn(name: str, default: float) -> Callable[[HFConfig], Any]:
    return lambda hf: _rope(hf).parameters.get(name, default)


def _trained_length(hf: HFConfig) -> int:
    return _rope(hf).parameters.get("original_max_position_embeddings", hf["max_position_embeddings"])


def _moe_layers(hf: HFConfig) -> list[int]:
    first, every = hf.get("first_k_dense_replace", 0), hf.get("moe_layer_freq", 1)
    return [int(layer >= first and layer % every == 0) for layer in range(hf["num_hidden_layers"])]


def _group_topk(hf: HFConfig) -> int:
    groups, experts = hf["topk_group"], hf["num_experts_per_tok"]
    if experts != 2 * groups:  # a group's score is the sum of its best two here, of its best experts / groups in core
        raise ValueError(f"config.json: num_experts_per_tok={experts} must be twice topk_group={groups}")
    return groups


def _epsilon(hf: HFConfig) -> float:
    if hf["rms_norm_eps"] != 1e-6:
        raise ValueError(f"config.json: rms_norm_eps={hf['rms_norm_eps']} must be 1e-06, as in the latents' norms")
    return hf["rms_norm_eps"]


def _quantized(hf: HFConfig) -> str:
    if not (quantization := hf.get("quantization_config")):
        return ""
    return (
        f"config.json: quantization_config says that the weights are in {quantization.get('quant_method')}; cast them "
        "to bfloat16 first, with DeepSeek's own script, and take quantization_config out"
    )


def _layer(m: str, h: str) -> tuple[Rule, ...]:
    """The rules of a transformer layer, in the decoder or inside multi-token prediction."""
    attention, hf_attention = m + "self_attention.", h + "self_attn."
    mlps = {
        m + "mlp.": h + "mlp.",
        m + "mlp.shared_experts.": h + "mlp.shared_experts.",
        m + "mlp.experts.local_experts.*.": h + "mlp.experts.*.",
    }
    return (
        Copy(m + "input_layernorm.weight", h + "input_layernorm.weight"),
        Copy(attention + "linear_q_proj.weight", hf_attention + "q_proj.weight"),
        Copy(attention + "linear_q_down_proj.weight", hf_attention + "q_a_proj.weight"),
        Copy(attention + "q_layernorm.weight", hf_attention + "q_a_layernorm.weight"),
        Copy(attention + "linear_q_up_proj.weight", hf_attention + "q_b_proj.weight"),
        Copy(attention + "linear_kv_down_proj.weight", hf_attention + "kv_a_proj_with_mqa.weight"),
        Copy(attention + "kv_layernorm.weight", hf_attention + "kv_a_layernorm.weight"),
        Copy(attention + "linear_kv_up_proj.weight", hf_attention + "kv_b_proj.weight"),
        Copy(attention + "linear_proj.weight", hf_attention + "o_proj.weight"),
        Copy(m + "pre_mlp_layernorm.weight", h + "post_attention_layernorm.weight"),
        Copy(m + "mlp.router.weight", h + "mlp.gate.weight"),
        Copy(m + "mlp.router.expert_bias", h + "mlp.gate.e_score_correction_bias"),
        *(Stack(a + "linear_fc1.weight", b + "gate_proj.weight", b + "up_proj.weight") for a, b in mlps.items()),
        *(Copy(a + "linear_fc2.weight", b + "down_proj.weight") for a, b in mlps.items()),
    )


_MTP, _HF_MTP = "mtp.layers.*.", "model.layers.+*."

DEEPSEEK = Family(
    name="deepseek",
    hf_types=("deepseek_v3",),
    config={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": _equal("num_attention_heads", "num_key_value_heads"),
        "kv_channels": "v_head_dim",
        "layernorm_epsilon": _epsilon,
        "attention_dropout": lambda hf: hf.get("attention_dropout", 0.0),
        "init_method_std": lambda hf: hf.get("initializer_range", 0.02),
        # latent attention
        "q_lora_rank": lambda hf: hf.get("q_lora_rank"),
        "kv_lora_rank": "kv_lora_rank",
        "qk_head_dim": "qk_nope_head_dim",
        "qk_pos_emb_head_dim": _equal("qk_rope_head_dim", "head_dim"),
        "v_head_dim": "v_head_dim",
        "rope_type": lambda hf: _ROPE_TYPES[_rope(hf).rope_type],
        "rotary_base": lambda hf: _rope(hf).rope_theta,
        "rotary_scaling_factor": _yarn("factor", 1.0),
        "original_max_position_embeddings": _trained_length,
        "beta_fast": _yarn("beta_fast", 32),
        "beta_slow": _yarn("beta_slow", 1),
        "mscale": _yarn("mscale", 1.0),
        "mscale_all_dim": _yarn("mscale_all_dim", 0.0),
        # experts
        "num_moe_experts": "n_routed_experts",
        "moe_layer_freq": _moe_layers,
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_shared_expert_intermediate_size": lambda hf: hf["moe_intermediate_size"] * hf["n_shared_experts"],
        "moe_router_topk": "num_experts_per_tok",
        "moe_router_num_groups": "n_group",
        "moe_router_group_topk": _group_topk,
        "moe_router_topk_scaling_factor": "routed_scaling_factor",
        # multi-token prediction
        "mtp_num_layers": lambda hf: hf.get("num_nextn_predict_layers", 0) or None,
    },
    fixed={
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
    },
    inert={
        "attention_bias": lambda value: value is False,
        "scoring_func": lambda value: value == "sigmoid",
        "topk_method": lambda value: value == "noaux_tc",
        "norm_topk_prob": lambda value: value is True,
        "rope_interleave": lambda value: value is True,
        "output_router_logits": lambda value: value is False,
        "qk_head_dim": lambda value: True,  # transformers derives it from the two parts
        "ep_size": lambda value: True,  # a layout
        "pretraining_tp": lambda value: True,
        "aux_loss_alpha": lambda value: True,  # of a router that is not this one
        "seq_aux": lambda value: True,
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
