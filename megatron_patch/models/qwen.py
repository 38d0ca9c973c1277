"""Qwen 1.0: its own tensor names, biases of queries, keys and values, and two ways to read beyond the trained length.

Bai et al. 2023, "Qwen Technical Report", section 2.3. Outside of training, texts longer than `seq_length` turn slower
(dynamic NTK, in steps) and their late queries grow with the logarithm of their position.
"""

from __future__ import annotations

from megatron_patch.family import Amendment, Family, HFConfig, Rope, Swap, anything, only, sizes
from megatron_patch.models.llama import LLAMA
from megatron_patch.weights import Copy, Stack, StackedQKV, copies

M, H = "decoder.layers.*.", "transformer.h.*."


def _kv_channels(hf: HFConfig) -> int:
    channels, hidden, heads = hf["kv_channels"], hf["hidden_size"], hf["num_attention_heads"]
    if channels * heads != hidden:
        raise ValueError(
            f"config.json: kv_channels={channels} must be hidden_size / num_attention_heads={hidden // heads}"
        )
    return channels


def _rope(hf: HFConfig) -> Rope:
    stretches = hf.get("use_dynamic_ntk", True)
    return Rope(
        rope_type="ntk_steps" if stretches else "default",
        rope_theta=float(hf.get("rotary_emb_base", 10000)),
        max_position_embeddings=hf["max_position_embeddings"],
        parameters={"original_max_position_embeddings": hf["seq_length"]} if stretches else {},
    )


def _grows(hf: HFConfig) -> bool:
    return hf.get("use_logn_attn", True)


QWEN = Family(
    name="qwen",
    models="Qwen 1.8B to 72B",
    hf_types=("qwen",),
    special="biases of queries, keys and values; beyond the trained length dynamic NTK and log-n attention",
    reference="tests/reference/qwen.py",
    config={
        **sizes("num_hidden_layers", "hidden_size", "num_attention_heads", "attn_dropout_prob"),
        "ffn_hidden_size": lambda hf: hf["intermediate_size"] // 2,  # counted twice: of gate and up
        "kv_channels": _kv_channels,
        "layernorm_epsilon": lambda hf: hf.get("layer_norm_epsilon", 1e-6),
    },
    fixed={**LLAMA.fixed, "add_qkv_bias": True},
    activation=lambda hf: "silu",
    rope=_rope,
    tied=lambda hf: False,
    swaps=(Swap("self_attention.core_attention", "attention.LogNAttention", _grows),),
    amendments=(Amendment("attention.tell_trained_length", _grows, lambda hf: {"length": hf["seq_length"]}),),
    inert={
        # what a published checkpoint never has
        **only(False, "tie_word_embeddings", "use_cache_quantization"),
        **only(True, "no_bias", "scale_attn_weights"),
        **only(0, "emb_dropout_prob"),
        **only(1, "rotary_pct"),
        # precision and kernels; the length of training where nothing sets in beyond it
        **anything("bf16", "fp16", "fp32", "softmax_in_fp32", "use_flash_attn"),
        **anything("onnx_safe", "use_cache_kernel", "seq_length"),
    },
    weights=(
        Copy("embedding.word_embeddings.weight", "transformer.wte.weight"),
        *(StackedQKV(M + f"self_attention.linear_qkv.{w}", H + f"attn.c_attn.{w}") for w in ("weight", "bias")),
        *copies({"input_layernorm": "ln_1", "pre_mlp_layernorm": "ln_2"}, M, H, ["weight"]),
        *copies({"self_attention.linear_proj": "attn.c_proj", "mlp.linear_fc2": "mlp.c_proj"}, M, H, ["weight"]),
        Stack(M + "mlp.linear_fc1.weight", H + "mlp.w2.weight", H + "mlp.w1.weight"),  # the second is the gate
        Copy("decoder.final_layernorm.weight", "transformer.ln_f.weight"),
        Copy("output_layer.weight", "lm_head.weight"),
    ),
    ignored_weights=(r"transformer\.(h\.\d+\.attn\.)?rotary_emb\.inv_freq", r"transformer\.h\.\d+\.attn\.masked_bias"),
)
