"""StarCoder2: rotary embedding, grouped queries and a window, GPT-2's norms, biases and MLP (Lozhkov et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from megatron_patch.family import anything, only
from megatron_patch.models.gpt2 import one_dropout
from megatron_patch.models.llama import LLAMA, H, M
from megatron_patch.models.mistral import window
from megatron_patch.weights import copies

_KEPT = ("word_embeddings", "self_attention.", "output_layer.")

STARCODER2 = replace(
    LLAMA,
    name="starcoder2",
    models="StarCoder2",
    hf_types=("starcoder2",),
    special="sliding window, LayerNorm, biases, GELU",
    config={
        **{name: source for name, source in LLAMA.config.items() if name != "add_qkv_bias"},
        "num_query_groups": "num_key_value_heads",
        "window_size": window,
        "layernorm_epsilon": lambda hf: hf.get("norm_epsilon", 1e-5),
        "hidden_dropout": lambda hf: one_dropout(hf, "residual_dropout", "embedding_dropout", 0.0),
        "init_method_std": lambda hf: hf.get("initializer_range", 0.018042),
        "add_bias_linear": lambda hf: hf.get("use_bias", True),
    },
    fixed={"normalization": "LayerNorm", "gated_linear_unit": False},
    activation=lambda hf: hf.get("hidden_act", "gelu_pytorch_tanh"),
    tied=lambda hf: hf.get("tie_word_embeddings", True),
    swaps=(),
    inert={
        **anything("activation_function"),  # hidden_act is what counts
        **anything("layer_norm_epsilon", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
        **only(True, "scale_attn_weights"),
        **only("default", "mlp_type"),
        **only("layer_norm", "norm_type"),
    },
    weights=(
        *(rule for rule in LLAMA.weights if any(part in rule.internal for part in _KEPT)),
        *copies({"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}, M, H),
        *copies({"mlp.linear_fc1": "mlp.c_fc", "mlp.linear_fc2": "mlp.c_proj"}, M, H),
        *copies({"decoder.final_layernorm": "model.norm"}),
    ),
)
