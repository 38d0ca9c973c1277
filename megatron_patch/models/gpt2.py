"""GPT-2, and GPT-3-like models in its format: learned positions, biases, matrices with inputs before outputs.

Radford et al. 2019; Brown et al. 2020 (Cerebras-GPT, BioMedLM and others have published such models).
"""

from __future__ import annotations

from megatron_patch.family import Family, HFConfig, Positions, Swap, anything, only, sizes
from megatron_patch.weights import Copy, StackedQKV, Transposed, copies

M, H = "decoder.layers.*.", "transformer.h.*."
_LINEARS = copies(
    {"self_attention.linear_proj": "attn.c_proj", "mlp.linear_fc1": "mlp.c_fc", "mlp.linear_fc2": "mlp.c_proj"}, M, H
)


def one_dropout(hf: HFConfig, residual: str, embedding: str, default: float) -> float:
    """megatron-core has one rate for what the embedding and each sublayer give."""
    rate, of_embedding = hf.get(residual, default), hf.get(embedding, default)
    if rate != of_embedding:
        raise ValueError(f"config.json: {embedding}={of_embedding} must equal {residual}={rate}")
    return rate


GPT2 = Family(
    name="gpt2",
    models="GPT-2, GPT-3-like, Cerebras-GPT",
    hf_types=("gpt2",),
    special="learned positions, LayerNorm, biases, GELU, matrices stored transposed",
    config={
        **sizes("n_layer", "n_embd", "n_head"),
        "ffn_hidden_size": lambda hf: hf.get("n_inner", 4 * hf["n_embd"]),
        "softmax_scale": lambda hf: None if hf.get("scale_attn_weights", True) else 1.0,
        "layernorm_epsilon": lambda hf: hf.get("layer_norm_epsilon", 1e-5),
        "attention_dropout": lambda hf: hf.get("attn_pdrop", 0.1),
        "hidden_dropout": lambda hf: one_dropout(hf, "resid_pdrop", "embd_pdrop", 0.1),
    },
    fixed={"normalization": "LayerNorm", "gated_linear_unit": False, "add_bias_linear": True},
    max_position_embeddings="n_positions",
    activation=lambda hf: hf.get("activation_function", "gelu_new"),
    positions=lambda hf: Positions(hf["n_positions"]),
    tied=lambda hf: hf.get("tie_word_embeddings", True),
    swaps=(
        Swap(
            "self_attention.core_attention",
            "attention.DepthScaledAttention",
            lambda hf: hf.get("scale_attn_by_inverse_layer_idx", False),
        ),
    ),
    inert={
        **anything("reorder_and_upcast_attn", "n_ctx", "output_past"),  # rounding; names of old configs
        **anything("summary_type", "summary_use_proj", "summary_activation"),  # a head for classification
        **anything("summary_proj_to_labels", "summary_first_dropout", "predict_special_tokens"),
        **only(False, "add_cross_attention"),
        **only(0, "n_special"),
    },
    weights=(
        Copy("embedding.word_embeddings.weight", "transformer.wte.weight"),
        Copy("embedding.position_embeddings.weight", "transformer.wpe.weight"),
        *copies({"input_layernorm": "ln_1", "pre_mlp_layernorm": "ln_2"}, M, H),
        Transposed(StackedQKV(M + "self_attention.linear_qkv.weight", H + "attn.c_attn.weight")),
        StackedQKV(M + "self_attention.linear_qkv.bias", H + "attn.c_attn.bias"),
        *(Transposed(rule) if rule.internal.endswith("weight") else rule for rule in _LINEARS),
        *copies({"decoder.final_layernorm": "transformer.ln_f"}),
        Copy("output_layer.weight", "lm_head.weight"),
    ),
    ignored_weights=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),  # the causal mask
    tied_weights=("lm_head.weight",),
)
