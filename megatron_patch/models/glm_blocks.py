"""GLM with block infilling (glm-10b, glm-2b, glm-large): a prefix mask and two tables of learned positions (Du et al.
2022). The published class is saved with the prefix ``glm.`` before each name, the bare model without it."""

from __future__ import annotations

from dataclasses import replace

from megatron_patch.family import Amendment, Family, HFConfig, Positions, anything, only
from megatron_patch.models.chatglm import GLM_CONFIG, GLM_FIXED, LAYER, glm_layers
from megatron_patch.models.gpt2 import one_dropout
from megatron_patch.weights import Rule, StackedQKV, copies

# The published config names no special tokens: these are theirs, by the size of the vocabulary.
_SPECIAL = {
    50304: {"sop_token_id": 50257, "mask_token_id": 50260, "gmask_token_id": 50263, "smask_token_id": 50264},
    50048: {"sop_token_id": 50006, "mask_token_id": 50003, "gmask_token_id": 50009, "smask_token_id": 50008},
}


def _token(hf: HFConfig, name: str) -> int:
    if (token := hf.get(name, _SPECIAL.get(hf["vocab_size"], {}).get(name))) is None:
        known = " or ".join(map(str, _SPECIAL))
        raise ValueError(f"config.json: {name} must be given where vocab_size={hf['vocab_size']} is not {known}")
    return token


def _rows(hf: HFConfig) -> int:
    return hf["max_sequence_length"] + 1


def _weights(prefix: str) -> tuple[Rule, ...]:
    qkv = LAYER + "self_attention.linear_qkv."
    tables = {f"{name}_embeddings": f"transformer.{name}_embeddings" for name in ("position", "block_position")}
    return (
        *copies({"word_embeddings": "word_embeddings", **tables}, "embedding.", prefix, ["weight"]),
        *(
            StackedQKV(rule.internal, *rule.hf) if rule.internal.startswith(qkv) else rule
            for rule in glm_layers(prefix + "transformer.layers.*.")
        ),
        *copies({"decoder.final_layernorm": f"{prefix}transformer.final_layernorm"}),
    )


def _is_wrapped(values: dict) -> bool:
    return values.get("architectures") == ["GLMForConditionalGeneration"]


GLM_BLOCKS = Family(
    name="glm_blocks",
    models="GLM-10B, 2B, large",
    hf_types=("glm",),
    matches=lambda values: "block_position_encoding" in values and not _is_wrapped(values),
    special="prefix mask, learned positions and block positions, GELU",
    reference="tests/reference/glm_blocks.py",
    config={
        **GLM_CONFIG,
        "ffn_hidden_size": lambda hf: 4 * hf["hidden_size"],
        "layernorm_epsilon": lambda hf: 1e-5,
        "attention_dropout": lambda hf: hf.get("attention_dropout_prob", 0.1),
        "hidden_dropout": lambda hf: one_dropout(hf, "output_dropout_prob", "embedding_dropout_prob", 0.1),
    },
    fixed={name: value for name, value in GLM_FIXED.items() if name != "hidden_dropout"},
    max_position_embeddings="max_sequence_length",
    activation=lambda hf: "gelu_pytorch_tanh",
    positions=lambda hf: Positions(_rows(hf)),
    tied=lambda hf: hf.get("tie_word_embeddings", True),
    amendments=(
        Amendment(
            "prefix.read_prefix",
            options=lambda hf: {
                "start": _token(hf, "sop_token_id"),
                "marks": (tuple(_token(hf, f"{kind}mask_token_id") for kind in ("", "s", "g")),),
            },
        ),
        Amendment("prefix.add_block_positions", options=lambda hf: {"rows": _rows(hf)}),
    ),
    inert={
        **anything("attention_scale"),  # scores are divided by it, and multiplied again
        **only(True, "block_position_encoding", "output_predict"),
        **only(False, "relative_encoding"),
        # of training, of other tasks, of a layout
        **anything("checkpoint_activations", "checkpoint_num_layers", "max_memory_length", "parallel_output"),
        **anything("pool_token", "spell_func", "spell_length"),
    },
    weights=_weights(""),
)

GLM_BLOCKS_WRAPPED = replace(
    GLM_BLOCKS,
    name="glm_blocks_wrapped",
    models="GLM-10B, 2B, large",
    matches=lambda values: "block_position_encoding" in values and _is_wrapped(values),
    special="the same, saved with glm. before each name",
    weights=_weights("glm."),
)
