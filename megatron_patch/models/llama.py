"""Llama: llama, llama2, codellama, llama3.x and all who keep its architecture (SmolLM2, Yi, deepseek-llm, ...)."""

from __future__ import annotations

from megatron_patch.family import Family, HFConfig, Swap, rope_from_config
from megatron_patch.weights import QKV, Copy, Stack

M, H = "decoder.layers.*.", "model.layers.*."


def _head_dim(hf: HFConfig) -> int:
    return hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"])


LLAMA = Family(
    name="llama",
    hf_types=("llama",),
    config={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": lambda hf: hf.get("num_key_value_heads", hf["num_attention_heads"]),
        "kv_channels": _head_dim,
        "layernorm_epsilon": lambda hf: hf.get("rms_norm_eps", 1e-6),
        "attention_dropout": lambda hf: hf.get("attention_dropout", 0.0),
        "init_method_std": lambda hf: hf.get("initializer_range", 0.02),
        "add_qkv_bias": lambda hf: hf.get("attention_bias", False),
    },
    fixed={"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False, "hidden_dropout": 0.0},
    rope=rope_from_config,
    swaps=(
        Swap(
            "self_attention.linear_proj", "linear.RowParallelLinearWithBias", lambda hf: hf.get("attention_bias", False)
        ),
        Swap("mlp.linear_fc1", "linear.ColumnParallelLinearWithBias", lambda hf: hf.get("mlp_bias", False)),
        Swap("mlp.linear_fc2", "linear.RowParallelLinearWithBias", lambda hf: hf.get("mlp_bias", False)),
    ),
    inert={
        "pretraining_tp": lambda value: True,  # slices a product without changing it
        "is_llama_config": lambda value: value is True,
        "rope_interleaved": lambda value: value is False,
    },
    weights=(
        Copy("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        Copy(M + "input_layernorm.weight", H + "input_layernorm.weight"),
        *(
            QKV(M + f"self_attention.linear_qkv.{w}", *(H + f"self_attn.{part}_proj.{w}" for part in "qkv"))
            for w in ("weight", "bias")
        ),
        *(Copy(M + f"self_attention.linear_proj.{w}", H + f"self_attn.o_proj.{w}") for w in ("weight", "bias")),
        Copy(M + "pre_mlp_layernorm.weight", H + "post_attention_layernorm.weight"),
        *(
            Stack(M + f"mlp.linear_fc1.{w}", H + f"mlp.gate_proj.{w}", H + f"mlp.up_proj.{w}")
            for w in ("weight", "bias")
        ),
        *(Copy(M + f"mlp.linear_fc2.{w}", H + f"mlp.down_proj.{w}") for w in ("weight", "bias")),
        Copy("decoder.final_layernorm.weight", "model.norm.weight"),
        Copy("output_layer.weight", "lm_head.weight"),
    ),
    ignored_weights=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    tied_weights=("lm_head.weight",),
)
