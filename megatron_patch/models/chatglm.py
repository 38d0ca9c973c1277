"""ChatGLM-6B, the first: a prefix mask, rotary positions on two axes, and scaled residuals (Zeng et al. 2022)."""

from __future__ import annotations

from megatron_patch.family import Amendment, Family, Rope, Swap, only, sizes
from megatron_patch.weights import Copy, Rule, TwoAxes, copies

LAYER = "decoder.layers.*."
_PLACES = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_qkv": "attention.query_key_value",  # head by head, as in megatron-core
    "self_attention.linear_proj": "attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}


def glm_layers(hf_layer: str) -> tuple[Rule, ...]:
    """The rules of a layer of any GLM of that time, each a copy."""
    return copies(_PLACES, LAYER, hf_layer)


def _rule(rule: Rule) -> Rule:
    return TwoAxes(rule) if "linear_qkv" in rule.internal else rule


GLM_CONFIG = {
    **sizes("num_layers", "hidden_size", "num_attention_heads"),
    "layernorm_epsilon": lambda hf: hf.get("layernorm_epsilon", 1e-5),
}
GLM_FIXED = {
    "normalization": "LayerNorm",
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "hidden_dropout": 0.0,
}

CHATGLM = Family(
    name="chatglm",
    models="ChatGLM-6B",
    hf_types=("chatglm",),
    matches=lambda values: "inner_hidden_size" in values,
    special="prefix mask, two rotary axes, scaled residuals of the normed input, GELU",
    reference="tests/reference/chatglm.py",
    config={**GLM_CONFIG, "ffn_hidden_size": "inner_hidden_size"},
    fixed=GLM_FIXED,
    max_position_embeddings="max_sequence_length",
    activation=lambda hf: "gelu_pytorch_tanh",
    rope=lambda hf: Rope("half", 10000.0, hf["max_sequence_length"], axes=2),
    tied=lambda hf: hf.get("tie_word_embeddings", True),
    swaps=(Swap("", "block.DeepNormLayer"),),
    amendments=(
        Amendment(
            "prefix.read_prefix",
            options=lambda hf: {
                "start": hf["bos_token_id"],
                "marks": ((hf.get("gmask_token_id", 130001),), (hf.get("mask_token_id", 130000),)),
            },
        ),
    ),
    inert={
        **only(True, "position_encoding_2d"),
        **only(False, "prefix_projection"),
        **only(0, "quantization_bit"),
    },
    weights=(
        Copy("embedding.word_embeddings.weight", "transformer.word_embeddings.weight"),
        *map(_rule, glm_layers("transformer.layers.*.")),
        *copies({"decoder.final_layernorm": "transformer.final_layernorm"}),
        Copy("output_layer.weight", "lm_head.weight"),
    ),
    tied_weights=("lm_head.weight",),
    ignored_weights=(r"transformer\.layers\.\d+\.attention\.rotary_emb\.inv_freq",),
)
