"""Baichuan 1 and 2, 7B and 13B: Llama with one matrix for queries, keys and values (Baichuan Inc. 2023).

Nothing in a config.json names the positions or the head: the 7B have rotary positions and `max_position_embeddings`,
the 13B ALiBi and `model_max_length` alone. Version 2, whose rows of the output layer count by their direction only, has
`z_loss_weight`, or at least its own vocabulary. The rotary base is a constant of the published code.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_patch.family import Amendment, HFConfig, Rope, Swap, anything, only, sizes
from megatron_patch.models.llama import LLAMA, H, M
from megatron_patch.weights import StackedQKV

_SIZES = sizes("num_hidden_layers", "hidden_size", "num_attention_heads")


def _max_positions(hf: HFConfig) -> int:
    return hf.get("max_position_embeddings", hf.get("model_max_length", 4096))


def _is_rotary(hf: HFConfig) -> bool:
    return hf.get("max_position_embeddings") is not None


def _is_version_2(hf: HFConfig) -> bool:
    if hf.get("z_loss_weight") is None and (rows := hf["vocab_size"]) > 125696:
        raise ValueError(f"config.json: vocab_size={rows} is of no Baichuan; add z_loss_weight=0 if it is a Baichuan 2")
    return hf.get("z_loss_weight") is not None or hf["vocab_size"] == 125696


BAICHUAN = replace(
    LLAMA,
    name="baichuan",
    models="Baichuan and Baichuan 2, 7B and 13B",
    hf_types=("baichuan",),
    special="one matrix for QKV; rotary (7B) or ALiBi (13B); version 2: NormHead, max-z loss",
    reference="tests/reference/baichuan.py",
    config={
        **{name: LLAMA.config[name] for name in ("ffn_hidden_size", "layernorm_epsilon")},
        **{name: value for name, value in _SIZES.items() if name != "attention_dropout"},
    },
    fixed={**LLAMA.fixed, "attention_dropout": 0.0},
    max_position_embeddings=_max_positions,
    rope=lambda hf: Rope(max_position_embeddings=_max_positions(hf)) if _is_rotary(hf) else None,
    tied=lambda hf: False,
    swaps=(Swap("self_attention.core_attention", "attention.AlibiAttention", lambda hf: not _is_rotary(hf)),),
    amendments=(
        Amendment("head.normalize", _is_version_2),
        Amendment(
            "head.add_max_z_loss",
            lambda hf: hf.get("z_loss_weight", 0) > 0,
            lambda hf: {"weight": hf["z_loss_weight"]},
        ),
    ),
    inert={
        **only(False, "tie_word_embeddings"),
        **anything("_from_model_config"),  # how the file came about
    },
    weights=(
        *(rule for rule in LLAMA.weights if ".linear_qkv." not in rule.internal and rule.internal.endswith("weight")),
        StackedQKV(M + "self_attention.linear_qkv.weight", H + "self_attn.W_pack.weight"),
    ),
    tied_weights=(),
)
