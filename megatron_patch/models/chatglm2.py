"""ChatGLM2, ChatGLM3 and the GLM-4 that was published with its own code: one model with three configs.

From the cards and configs of THUDM/chatglm2-6b, chatglm3-6b and glm-4-9b-chat. The first ChatGLM shares their
model_type and is another model. chatglm2-6b-32k is refused: its code reads `rope_ratio` in a way of its own.
"""

from __future__ import annotations

from megatron_patch.family import Family, HFConfig, Rope, anything, only
from megatron_patch.models.llama import LLAMA, M
from megatron_patch.weights import Copy, StackedQKV, copies

H = "transformer.encoder.layers.*."
_WEIGHT = ["weight"]
_REPEATED = {"num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size"}


def _num_layers(hf: HFConfig) -> int:
    for name, original in _REPEATED.items():
        if hf.get(name, hf[original]) != hf[original]:
            raise ValueError(f"config.json: {name}={hf[name]!r} must equal {original}={hf[original]!r}")
    return hf["num_layers"]


def _groups(hf: HFConfig) -> int:
    if not hf.get("multi_query_attention", False):  # its rows would be in another order
        raise ValueError("config.json: multi_query_attention=False is not supported; choose True")
    return hf["multi_query_group_num"]


def _rope(hf: HFConfig) -> Rope:
    ratio, name = hf.get("rope_ratio", 1), hf.get("_name_or_path", "")
    if ratio != 1 and hf["padded_vocab_size"] == 65024 and "chatglm3" not in name.lower():
        raise ValueError(
            f"config.json: rope_ratio={ratio!r} with padded_vocab_size=65024 and _name_or_path={name!r} looks like "
            "chatglm2-6b-32k, which divides positions by it and is not supported; choose rope_ratio=1, or a "
            "_name_or_path that says chatglm3 if it is that"
        )
    return Rope(rope_theta=10000.0 * ratio, max_position_embeddings=hf["seq_length"], fraction=0.5)


CHATGLM2 = Family(
    name="chatglm2",
    models="ChatGLM2, ChatGLM3, GLM-4-9B as published",
    hf_types=("chatglm",),
    matches=lambda values: {"ffn_hidden_size", "padded_vocab_size"} <= {*values} and "inner_hidden_size" not in values,
    special="rotary positions on half of each head, in neighbouring pairs; biases of queries, keys and values",
    reference="tests/reference/chatglm2.py",
    config={
        "num_layers": _num_layers,
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": _groups,
        "kv_channels": "kv_channels",
        "layernorm_epsilon": lambda hf: hf.get("layernorm_epsilon", 1e-5),
        "attention_dropout": lambda hf: hf.get("attention_dropout", 0.0),
    },
    fixed={**LLAMA.fixed, "add_qkv_bias": True, "rotary_interleaved": True},
    vocab_size="padded_vocab_size",
    max_position_embeddings="seq_length",
    activation=lambda hf: "silu",
    rope=_rope,
    tied=lambda hf: False,
    inert={
        **only(True, "rmsnorm", "post_layer_norm", "add_qkv_bias", "original_rope"),
        **only(False, "add_bias_linear", "apply_residual_connection_post_layernorm"),
        **only(False, "fp32_residual_connection", "tie_word_embeddings"),
        # Dropout; prompt tuning without a prompt; int4 and int8 files.
        **only(0, "hidden_dropout", "pre_seq_len", "prefix_projection", "quantization_bit"),
        # How products are scaled, rounded and fused; a head for classification.
        **anything("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion"),
        **anything("classifier_dropout"),
    },
    weights=(
        Copy("embedding.word_embeddings.weight", "transformer.embedding.word_embeddings.weight"),
        *(
            StackedQKV(M + f"self_attention.linear_qkv.{w}", H + f"self_attention.query_key_value.{w}")
            for w in ("weight", "bias")
        ),
        *copies({"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}, M, H, _WEIGHT),
        *copies({"self_attention.linear_proj": "self_attention.dense"}, M, H, _WEIGHT),
        # Gate over up, as in megatron-core.
        *copies({"mlp.linear_fc1": "mlp.dense_h_to_4h", "mlp.linear_fc2": "mlp.dense_4h_to_h"}, M, H, _WEIGHT),
        Copy("decoder.final_layernorm.weight", "transformer.encoder.final_layernorm.weight"),
        Copy("output_layer.weight", "transformer.output_layer.weight"),
    ),
    ignored_weights=(r"transformer\.rotary_pos_emb\.inv_freq",),
)
