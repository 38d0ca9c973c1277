"""BLOOM: ALiBi instead of positions, a norm after the embedding, biases everywhere (BigScience 2022)."""

from __future__ import annotations

from megatron_patch.family import Amendment, Family, Swap, anything, either, only, sizes
from megatron_patch.weights import Copy, copies

M, H = "decoder.layers.*.", "transformer.h.*."
_HIDDEN = either("hidden_size", "n_embed")

BLOOM = Family(
    name="bloom",
    models="BLOOM, BLOOMZ",
    hf_types=("bloom",),
    special="ALiBi, LayerNorm after the embedding, biases, GELU",
    config={
        **sizes(either("n_layer", "num_hidden_layers"), _HIDDEN, either("n_head", "num_attention_heads")),
        "ffn_hidden_size": lambda hf: 4 * _HIDDEN(hf),
        "layernorm_epsilon": lambda hf: hf.get("layer_norm_epsilon", 1e-5),
        "hidden_dropout": lambda hf: hf.get("hidden_dropout", 0.0),
    },
    fixed={"normalization": "LayerNorm", "gated_linear_unit": False, "add_bias_linear": True},
    activation=lambda hf: "gelu_pytorch_tanh",
    max_position_embeddings=lambda hf: hf.get("seq_length", 2048),
    tied=lambda hf: hf.get("tie_word_embeddings", True),
    swaps=(
        Swap("self_attention.core_attention", "attention.AlibiAttention"),
        Swap("", "block.NormedResidualLayer", lambda hf: hf.get("apply_residual_connection_post_layernorm", False)),
    ),
    amendments=(Amendment("embedding.add_norm"), Amendment("embedding.without_dropout")),
    inert={
        **anything("pretraining_tp", "slow_but_exact"),  # how a product is cut into slices
        **anything("offset_alibi", "skip_bias_add", "attention_softmax_in_fp32"),
        **anything("masked_softmax_fusion", "bias_dropout_fusion", "unk_token_id"),
        **only(False, "skip_bias_add_qkv"),
    },
    weights=(
        Copy("embedding.word_embeddings.weight", "transformer.word_embeddings.weight"),
        *copies({"embedding.norm": "transformer.word_embeddings_layernorm"}),
        *copies({"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}, M, H),
        *copies({"self_attention.linear_qkv": "self_attention.query_key_value"}, M, H),  # per head, as in megatron-core
        *copies({"self_attention.linear_proj": "self_attention.dense"}, M, H),
        *copies({"mlp.linear_fc1": "mlp.dense_h_to_4h", "mlp.linear_fc2": "mlp.dense_4h_to_h"}, M, H),
        *copies({"decoder.final_layernorm": "transformer.ln_f"}),
        Copy("output_layer.weight", "lm_head.weight"),
    ),
    tied_weights=("lm_head.weight",),
)
