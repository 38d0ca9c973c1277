"""Llama: llama, llama2, codellama, llama3.x and all who keep its architecture (SmolLM2, Yi, deepseek-llm, ...)."""

from __future__ import annotations

from megatron_patch.family import Family, HFConfig, Swap, anything, only, rope_from_config, sizes
from megatron_patch.weights import QKV, Copy, Stack, copies

M, H = "decoder.layers.*.", "model.layers.*."


def _window(hf: HFConfig) -> tuple[int, int] | None:
    size = hf["sliding_window"] if hf.get("use_sliding_window", False) else None
    return (size - 1, 0) if size else None


def _windowed_layers(hf: HFConfig) -> list[int] | None:
    if not _window(hf):
        return None
    layers, kinds = hf["num_hidden_layers"], hf.get("layer_types")
    if kinds is None:
        first = min(hf["max_window_layers"], layers)
        kinds = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    return [int(kind == "sliding_attention") for kind in kinds]


WINDOW = {"window_size": _window, "window_attn_skip_freq": _windowed_layers}
"""The sliding window of those of its kin that have one: some layers' queries see so many keys before them only."""

WINDOW_FIELDS = {
    "layer_types": lambda value: set(value) == {"full_attention"},
    **anything("max_window_layers", "sliding_window"),  # without a window
}

LLAMA = Family(
    name="llama",
    models="Llama 1 to 3.x, Code Llama, Yi, DeepSeek LLM, SmolLM2",
    hf_types=("llama",),
    special="the base: RMSNorm, SwiGLU, grouped queries, rotary scaling linear, dynamic, llama3, yarn",
    config={
        **sizes("num_hidden_layers", "hidden_size", "num_attention_heads"),
        "ffn_hidden_size": "intermediate_size",
        "num_query_groups": lambda hf: hf.get("num_key_value_heads", hf["num_attention_heads"]),
        "kv_channels": lambda hf: hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"]),
        "layernorm_epsilon": lambda hf: hf.get("rms_norm_eps", 1e-6),
        "add_qkv_bias": lambda hf: hf.get("attention_bias", False),
    },
    fixed={"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False, "hidden_dropout": 0.0},
    max_position_embeddings=lambda hf: hf.get("max_position_embeddings", 2048),
    rope=lambda hf: rope_from_config(hf, default_length=2048),
    swaps=(
        Swap(
            "self_attention.linear_proj", "linear.RowParallelLinearWithBias", lambda hf: hf.get("attention_bias", False)
        ),
        Swap("mlp.linear_fc1", "linear.ColumnParallelLinearWithBias", lambda hf: hf.get("mlp_bias", False)),
        Swap("mlp.linear_fc2", "linear.RowParallelLinearWithBias", lambda hf: hf.get("mlp_bias", False)),
    ),
    inert={
        **anything("pretraining_tp"),  # slices a product without changing it
        **anything("max_sequence_length"),  # of the first conversions; max_position_embeddings is what counts
        **only(True, "is_llama_config"),
        **only("swiglu", "activation"),  # Falcon 3
        "layer_types": WINDOW_FIELDS["layer_types"],
        **only(False, "rope_interleaved"),
    },
    weights=(
        Copy("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        *copies(
            {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}, M, H, ["weight"]
        ),
        *(
            QKV(M + f"self_attention.linear_qkv.{w}", *(H + f"self_attn.{part}_proj.{w}" for part in "qkv"))
            for w in ("weight", "bias")
        ),
        *copies({"self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj"}, M, H),
        *(
            Stack(M + f"mlp.linear_fc1.{w}", H + f"mlp.gate_proj.{w}", H + f"mlp.up_proj.{w}")
            for w in ("weight", "bias")
        ),
        Copy("decoder.final_layernorm.weight", "model.norm.weight"),
        Copy("output_layer.weight", "lm_head.weight"),
    ),
    ignored_weights=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    tied_weights=("lm_head.weight",),
)
