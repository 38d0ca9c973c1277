"""GLM-130B: a prefix mask, DeepNorm, GEGLU (Zeng et al. 2022). The names are those of its published inference code,
merged to one rank; it has no config.json of its own, see tests/reference/glm130b.py for the fields of ours."""

from __future__ import annotations

from megatron_patch.family import Amendment, Family, Rope, Swap, anything, only
from megatron_patch.models.chatglm import GLM_CONFIG, GLM_FIXED, glm_layers
from megatron_patch.weights import Copy, Exchanged, Rule, copies

_SPECIAL = {"sop_token_id": 150004, "mask_token_id": 150000, "gmask_token_id": 150001, "smask_token_id": 150002}


def _rule(rule: Rule) -> Rule:
    # Here the second half is the gate.
    return Exchanged(rule.internal, *rule.hf) if "linear_fc1" in rule.internal else rule


GLM130B = Family(
    name="glm130b",
    models="GLM-130B",
    hf_types=("glm130b",),
    special="prefix mask, DeepNorm, GEGLU, rotary positions",
    reference="tests/reference/glm130b.py",
    config={**GLM_CONFIG, "ffn_hidden_size": "inner_hidden_size"},
    fixed={**GLM_FIXED, "gated_linear_unit": True},
    max_position_embeddings="max_sequence_length",
    activation=lambda hf: "gelu",
    rope=lambda hf: Rope("default", 10000.0, hf["max_sequence_length"]),
    tied=lambda hf: hf.get("tie_word_embeddings", True),
    swaps=(Swap("", "block.DeepNormLayer"),),
    amendments=(
        Amendment(
            "prefix.read_prefix",
            # After [gMASK] positions count on, so it is no mark.
            options=lambda hf: {
                "start": hf.get("sop_token_id", _SPECIAL["sop_token_id"]),
                "marks": tuple((hf.get(name, _SPECIAL[name]),) for name in ("mask_token_id", "smask_token_id")),
            },
        ),
    ),
    inert={
        **anything("gmask_token_id", "eop_token_id"),
        **only("post", "layernorm_order"),
        **only(False, "no_glu", "position_encoding_2d"),
    },
    weights=(
        Copy("embedding.word_embeddings.weight", "transformer.word_embeddings.weight"),
        *map(_rule, glm_layers("transformer.layers.*.")),
        *copies({"decoder.final_layernorm": "transformer.final_layernorm"}),
    ),
    ignored_weights=(
        r"transformer\.layers\.\d+\.attention\.rotary_emb\.inv_freq",
        r"(transformer\.)?mixins\.rotary-embedding\.rotary_emb\.inv_freq",
    ),
)
