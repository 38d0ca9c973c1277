"""Tiny random models and tokens that many tests share: Llamas of every variant, and mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch

BASE: dict[str, Any] = dict(
    vocab_size=200,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    head_dim=6,
    tie_word_embeddings=False,
)


def _rope(rope_type: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=rope_type, rope_theta=theta, **parameters))


VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": dict(num_key_value_heads=8),
    "tied": dict(tie_word_embeddings=True),
    "head_dim": dict(head_dim=10),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "theta": _rope("default", theta=500.0),
    "linear": _rope("linear", factor=4.0),
    "dynamic": dict(**_rope("dynamic", factor=4.0), max_position_embeddings=20),
    "llama3": _rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "yarn_factor": _rope("yarn", factor=4.0, attention_factor=1.3),
    "mqa": dict(num_key_value_heads=1),
}


def hf_llama(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random LlamaForCausalLM in fp32, eval mode; norms and biases are random too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.12)
    return model


_MIXTRAL: dict[str, Any] = {**BASE, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}

_DEEPSEEK: dict[str, Any] = dict(
    vocab_size=200,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=64,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=10,
    first_k_dense_replace=1,
    moe_intermediate_size=32,
    n_routed_experts=8,
    n_shared_experts=2,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=4,
    num_nextn_predict_layers=0,
)

MOE: dict[str, dict[str, Any]] = {
    "mixtral": dict(model_type="mixtral", **_MIXTRAL),
    "mixtral_4_top_3": dict(model_type="mixtral", **{**_MIXTRAL, "num_local_experts": 4, "num_experts_per_tok": 3}),
    "deepseek": dict(model_type="deepseek_v3", **_DEEPSEEK),
    "deepseek_yarn": dict(
        model_type="deepseek_v3",
        **_DEEPSEEK,
        **_rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7),
    ),
    "deepseek_plain_query": dict(model_type="deepseek_v3", **{**_DEEPSEEK, "q_lora_rank": None}),
}


def hf_moe(variant: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random mixture of experts in fp32, eval mode; norms and biases are random too, and the router has clear
    preferences: no rounding error changes an expert."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**MOE[variant], **changes})).eval()
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                values.normal_(1.0 if "norm" in name else 0.0, 0.5 if "gate.weight" in name else 0.12)
    return model


def tokens(batch: int = 2, length: int = 32, vocab_size: int = 200, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
