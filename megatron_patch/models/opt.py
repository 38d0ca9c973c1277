"""OPT and Galactica: learned positions from the third row on, ReLU or GELU, biases and norms' weights at choice.

Zhang et al. 2022; Taylor et al. 2022 (Galactica: GELU, no biases, norms without weights).
"""

from __future__ import annotations

from megatron_patch.family import Amendment, Family, HFConfig, Positions, only, sizes
from megatron_patch.weights import QKV, Copy, copies

M, H = "decoder.layers.*.", "model.decoder.layers.*."


def _hidden_size(hf: HFConfig) -> int:
    if hf.get("word_embed_proj_dim", hf["hidden_size"]) != hf["hidden_size"]:
        raise ValueError(
            f"config.json: word_embed_proj_dim={hf['word_embed_proj_dim']} must equal hidden_size={hf['hidden_size']}; "
            "OPT-350M is not supported"
        )
    return hf["hidden_size"]


OPT = Family(
    name="opt",
    models="OPT (but 350M), Galactica",
    hf_types=("opt",),
    special="learned positions from row 2 on, LayerNorm, ReLU or GELU; Galactica: no biases, plain norms",
    config={
        **sizes("num_hidden_layers", "hidden_size", "num_attention_heads"),
        "hidden_size": _hidden_size,
        "ffn_hidden_size": "ffn_dim",
        "hidden_dropout": lambda hf: hf.get("dropout", 0.1),
        "init_method_std": lambda hf: hf.get("init_std", 0.02),
        "add_bias_linear": lambda hf: hf.get("enable_bias", True),
    },
    fixed={"normalization": "LayerNorm", "layernorm_epsilon": 1e-5, "gated_linear_unit": False},
    activation=lambda hf: hf.get("activation_function", "relu"),
    positions=lambda hf: Positions(hf["max_position_embeddings"] + 2, offset=2),
    tied=lambda hf: hf.get("tie_word_embeddings", True),
    amendments=(
        Amendment("norm.without_parameters", lambda hf: not hf.get("layer_norm_elementwise_affine", True)),
        Amendment("embedding.without_dropout"),
    ),
    inert={
        **only(True, "do_layer_norm_before", "learned_embeddings"),
        **only(False, "_remove_final_layer_norm", "scale_embeddings"),
        **only(0, "activation_dropout", "layerdrop"),
    },
    weights=(
        Copy("embedding.word_embeddings.weight", "model.decoder.embed_tokens.weight"),
        Copy("embedding.position_embeddings.weight", "model.decoder.embed_positions.weight"),
        *(
            QKV(M + f"self_attention.linear_qkv.{w}", *(H + f"self_attn.{part}_proj.{w}" for part in "qkv"))
            for w in ("weight", "bias")
        ),
        *copies({"input_layernorm": "self_attn_layer_norm", "pre_mlp_layernorm": "final_layer_norm"}, M, H),
        *copies({"self_attention.linear_proj": "self_attn.out_proj"}, M, H),
        *copies({"mlp.linear_fc1": "fc1", "mlp.linear_fc2": "fc2"}, M, H),
        *copies({"decoder.final_layernorm": "model.decoder.final_layer_norm"}),
        Copy("output_layer.weight", "lm_head.weight"),
    ),
    tied_weights=("lm_head.weight",),
)
