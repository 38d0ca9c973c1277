"""Multi-head latent attention, as all families from DeepSeek-V2 on have it (DeepSeek-AI 2024, section 2.1).

The rotary embedding is the one that megatron-core's latent attention builds for itself, so its parameters are config
fields here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_patch.family import HFConfig, Rope, Swap, rope_from_config
from megatron_patch.weights import Copy, Rule

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


LATENT = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": _equal("num_attention_heads", "num_key_value_heads"),
    "kv_channels": "v_head_dim",
    "layernorm_epsilon": "rms_norm_eps",
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
}
"""TransformerConfig fields of everything but the MLPs."""

LATENT_FIXED = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
}

LATENT_SWAPS = tuple(Swap(f"self_attention.{part}_layernorm", "norm.LatentRMSNorm") for part in ("q", "kv"))


def around_mlp(m: str, h: str) -> tuple[Rule, ...]:
    """The rules of a transformer layer but for its MLP, in the decoder or elsewhere."""
    ours, theirs = m + "self_attention.", h + "self_attn."
    return (
        Copy(m + "input_layernorm.weight", h + "input_layernorm.weight"),
        *(Copy(f"{ours}{a}.weight", f"{theirs}{b}.weight") for a, b in _ATTENTION.items()),
        Copy(m + "pre_mlp_layernorm.weight", h + "post_attention_layernorm.weight"),
    )


_ATTENTION = {
    "linear_q_proj": "q_proj",
    "linear_q_down_proj": "q_a_proj",
    "q_layernorm": "q_a_layernorm",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_layernorm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj",
    "linear_proj": "o_proj",
}
