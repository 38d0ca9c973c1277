"""The ``args`` of a legacy checkpoint: what Megatron-LM looks up there when it loads with --use-checkpoint-args."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from megatron_patch.checkpoint.legacy_ranks import Ranks
from megatron_patch.family import Architecture

# fmt: off
_SAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "normalization", "add_bias_linear", "qk_layernorm", "attention_dropout", "hidden_dropout", "init_method_std",
    "layernorm_zero_centered_gamma", "multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim",
    "qk_pos_emb_head_dim", "v_head_dim", "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "rope_type", "mtp_num_layers", "moe_layer_freq", "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size", "moe_router_topk", "moe_router_num_groups", "moe_router_group_topk",
    "moe_router_topk_scaling_factor", "moe_router_score_function", "moe_router_enable_expert_bias",
    "moe_router_pre_softmax", "moe_router_dtype", "moe_shared_expert_gate", "window_size", "window_attn_skip_freq",
)
"""Arguments with the name, and the meaning, of the TransformerConfig field."""
# fmt: on


def namespace(ranks: Ranks, divisible_by: int, dtype: torch.dtype, layout: str | None) -> Namespace:
    """The arguments of a training run that would have written this checkpoint.

    Args:
        divisible_by: what the vocabulary was padded by.
        dtype: of most parameters.
        layout: the pipeline layout string, where one was used.
    """
    architecture = ranks.model.architecture
    same = {name: architecture.config[name] for name in _SAME if name in architecture.config}
    return Namespace(
        **same,
        **_model(architecture),
        **_sizes(ranks, layout),
        vocab_size=architecture.vocab_size,
        padded_vocab_size=ranks.vocabulary,
        make_vocab_size_divisible_by=divisible_by,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        moe_grouped_gemm=ranks.naming.grouped,
        tokenizer_type="HuggingFaceTokenizer",
        ckpt_format="torch",
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )


def _model(architecture: Architecture) -> Mapping[str, Any]:
    config, rope = architecture.config, architecture.rope
    rotary = rope is not None or bool(config.get("multi_latent_attention"))
    learned = architecture.positions
    gated = bool(config.get("gated_linear_unit"))
    return {
        "group_query_attention": architecture.num_query_groups != architecture.num_attention_heads,
        "seq_length": architecture.max_position_embeddings,
        "max_position_embeddings": learned.rows if learned else architecture.max_position_embeddings,
        "position_embedding_type": "learned_absolute" if learned else "rope" if rotary else "none",
        "use_rotary_position_embeddings": rotary,
        "rotary_base": _integer(rope.rope_theta if rope else config.get("rotary_base", 10000)),
        "rotary_percent": float(rope.fraction) if rope else 1.0,
        "rotary_interleaved": bool(config.get("rotary_interleaved")),
        "use_rope_scaling": rope is not None and "low_freq_factor" in rope.parameters,
        "rope_scaling_factor": rope.parameters.get("factor", 1.0) if rope else 1.0,
        "add_position_embedding": learned is not None,
        "add_qkv_bias": bool(config.get("add_qkv_bias")),
        "layernorm_epsilon": config["layernorm_epsilon"],
        "norm_epsilon": config["layernorm_epsilon"],
        "swiglu": gated and architecture.activation == "silu",
        "squared_relu": False,
        "openai_gelu": architecture.activation in ("gelu_new", "gelu_pytorch_tanh"),
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "untie_embeddings_and_output_weights": not architecture.tied,
        "num_experts": config.get("num_moe_experts"),
    }


def _integer(value: float) -> float:
    """Megatron-LM's flag takes whole numbers."""
    return int(value) if value == int(value) else value


def _sizes(ranks: Ranks, layout: str | None) -> Mapping[str, Any]:
    of_stage = [sum(chunk.layers for chunk in ranks.chunks if chunk.stage == stage) for stage in range(ranks.stages)]
    virtual = ranks.virtual if ranks.virtual > 1 else None
    uneven = layout is None and len(set(of_stage)) > 1
    per_chunk = {chunk.layers for chunk in ranks.chunks}
    return {
        "tensor_model_parallel_size": ranks.tensor,
        "pipeline_model_parallel_size": ranks.stages,
        "virtual_pipeline_model_parallel_size": virtual,
        "num_layers_per_virtual_pipeline_stage": min(per_chunk) if virtual and len(per_chunk) == 1 else None,
        "decoder_first_pipeline_num_layers": of_stage[0] if uneven else None,
        "decoder_last_pipeline_num_layers": of_stage[-1] if uneven else None,
        "pipeline_model_parallel_layout": layout,
        "expert_model_parallel_size": ranks.expert,
        "expert_tensor_parallel_size": ranks.expert_tensor,
        "context_parallel_size": 1,
    }
