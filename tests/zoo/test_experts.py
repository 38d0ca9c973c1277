"""Mixtures of experts as they were published: every field is honoured, and the sizes are those their authors state.

The configs are those of the model cards' config.json files, from memory; sizes from the model cards' names and papers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.family import Architecture
from megatron_patch.model import flops_per_token, transformer_config
from megatron_patch.models import family_for

_COMMON: dict[str, Any] = dict(
    attention_dropout=0.0,
    hidden_act="silu",
    hidden_size=2048,
    initializer_range=0.02,
    num_attention_heads=16,
    num_key_value_heads=16,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    use_cache=True,
)
_QWEN: dict[str, Any] = dict(
    **_COMMON,
    decoder_sparse_step=1,
    norm_topk_prob=False,
    output_router_logits=False,
    rope_theta=1e6,
    router_aux_loss_coef=0.001,
    sliding_window=32768,
    use_sliding_window=False,
    vocab_size=151936,
)
_DEEPSEEK: dict[str, Any] = dict(
    **_COMMON,
    attention_bias=False,
    aux_loss_alpha=0.001,
    ep_size=1,
    first_k_dense_replace=1,
    intermediate_size=10944,
    kv_lora_rank=512,
    max_position_embeddings=163840,
    moe_intermediate_size=1408,
    moe_layer_freq=1,
    n_group=1,
    n_routed_experts=64,
    n_shared_experts=2,
    norm_topk_prob=False,
    num_experts_per_tok=6,
    num_hidden_layers=27,
    pretraining_tp=1,
    q_lora_rank=None,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    rope_theta=10000,
    routed_scaling_factor=1.0,
    scoring_func="softmax",
    seq_aux=True,
    topk_group=1,
    topk_method="greedy",
    v_head_dim=128,
    vocab_size=102400,
)
_YARN = dict(beta_fast=32, beta_slow=1, factor=40, original_max_position_embeddings=4096, type="yarn")

# Billions of weights that a token meets, as stated; how many of embedding and output layer are counted in; config.
PUBLISHED: dict[str, tuple[float, int, dict[str, Any]]] = {
    "Qwen1.5-MoE-A2.7B": (
        2.7,
        2,
        dict(
            _QWEN,
            model_type="qwen2_moe",
            intermediate_size=5632,
            max_position_embeddings=8192,
            max_window_layers=21,
            moe_intermediate_size=1408,
            num_experts=60,
            num_experts_per_tok=4,
            num_hidden_layers=24,
            qkv_bias=True,
            shared_expert_intermediate_size=5632,
        ),
    ),
    "Qwen3-30B-A3B": (
        3.3,
        2,
        dict(
            _QWEN,
            model_type="qwen3_moe",
            attention_bias=False,
            head_dim=128,
            intermediate_size=6144,
            max_position_embeddings=40960,
            max_window_layers=48,
            mlp_only_layers=[],
            moe_intermediate_size=768,
            norm_topk_prob=True,
            num_attention_heads=32,
            num_experts=128,
            num_experts_per_tok=8,
            num_hidden_layers=48,
            num_key_value_heads=4,
            rope_scaling=None,
            sliding_window=None,
        ),
    ),
    "DeepSeek-V2-Lite": (
        2.4,
        1,
        dict(_DEEPSEEK, model_type="deepseek_v2", rope_scaling=dict(_YARN, mscale=0.707, mscale_all_dim=0.707)),
    ),
    "DeepSeek-V2": (
        21.0,
        1,
        dict(
            _DEEPSEEK,
            model_type="deepseek_v2",
            hidden_size=5120,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            n_group=8,
            n_routed_experts=160,
            num_attention_heads=128,
            num_hidden_layers=60,
            num_key_value_heads=128,
            q_lora_rank=1536,
            rope_scaling=dict(_YARN, mscale=0.707, mscale_all_dim=0.707),
            routed_scaling_factor=16.0,
            topk_group=3,
            topk_method="group_limited_greedy",
        ),
    ),
    "Moonlight-16B-A3B": (
        2.24,
        0,
        dict(
            _DEEPSEEK,
            model_type="deepseek_v3",
            intermediate_size=11264,
            max_position_embeddings=8192,
            norm_topk_prob=True,
            num_nextn_predict_layers=0,
            rms_norm_eps=1e-5,
            rope_theta=50000.0,
            routed_scaling_factor=2.446,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            vocab_size=163840,
        ),
    ),
}


def _described(name: str) -> tuple[Architecture, TransformerConfig]:
    values = PUBLISHED[name][2]
    architecture = family_for(values).describe(values)
    return architecture, transformer_config(architecture, torch.bfloat16)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_token_meets_as_many_billion_weights_as_the_authors_state(name: str) -> None:
    architecture, config = _described(name)
    stated, vocabularies, _ = PUBLISHED[name]
    extra = (vocabularies - 1) * config.hidden_size * architecture.vocab_size  # the output layer is in
    assert (flops_per_token(architecture, 0) / 6 + extra) / 1e9 == pytest.approx(stated, rel=0.025)


def test_groups_are_chosen_only_where_some_are_left_out() -> None:
    groups = {name: _described(name)[1].moe_router_group_topk for name in PUBLISHED if name[0] in "DM"}
    assert groups == {"DeepSeek-V2-Lite": None, "DeepSeek-V2": 3, "Moonlight-16B-A3B": None}
