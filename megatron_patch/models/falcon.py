"""Falcon: attention and MLP side by side, with one norm (7B, 11B) or one each (40B, 180B), or in turn with ALiBi (RW).

Penedo et al. 2023; Almazrouei et al. 2023. The first checkpoints call the same model RefinedWeb and some fields
otherwise. ALiBi's biases are exact here. transformers rounds slopes and biases to bf16, whatever the model's dtype:
they are the same only with 1, 2, 4 or 8 heads and up to position 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_patch.family import Amendment, HFConfig, Rope, Swap, anything, either, only, rope_from_config
from megatron_patch.models.bloom import BLOOM, H, M
from megatron_patch.weights import copies

_LAYERS, _HEADS = either("num_hidden_layers", "n_layer"), either("num_attention_heads", "n_head")
_HIDDEN = either("hidden_size", "n_embed")


def _is_new(values: Mapping[str, Any] | HFConfig) -> bool:
    return bool(values.get("new_decoder_architecture") or values.get("n_head_kv"))


def _two_norms(values: Mapping[str, Any]) -> bool:
    return _is_new(values) and values.get("num_ln_in_parallel_attn") in (None, 2)


def _groups(hf: HFConfig) -> int:
    heads, groups = _HEADS(hf), hf.get("n_head_kv") or hf.get("num_kv_heads")
    if _is_new(hf):
        return groups or heads
    if hf.get("multi_query", True):
        return 1
    if groups not in (None, heads):
        raise ValueError(f"config.json: num_kv_heads={groups} must equal num_attention_heads={heads} here")
    return heads


def _is_parallel(hf: HFConfig) -> bool:
    parallel = hf.get("parallel_attn", True)
    if _is_new(hf) and not parallel:
        raise ValueError("config.json: parallel_attn=False is not supported with new_decoder_architecture; choose True")
    return parallel


def _rope(hf: HFConfig) -> Rope | None:
    rope = rope_from_config(hf, default_length=2048)
    return None if hf.get("alibi", False) else rope


FALCON = replace(
    BLOOM,
    name="falcon",
    models="Falcon 7B, 11B, RW",
    hf_types=("falcon", "RefinedWebModel", "RefinedWeb"),
    special="attention and MLP side by side under one LayerNorm, one key-value head; RW: ALiBi, biases, in turn",
    matches=lambda values: not _two_norms(values),
    config={
        **BLOOM.config,
        "num_layers": _LAYERS,
        "hidden_size": _HIDDEN,
        "ffn_hidden_size": lambda hf: hf.get("ffn_hidden_size", 4 * _HIDDEN(hf)),
        "num_attention_heads": _HEADS,
        "num_query_groups": _groups,
        "kv_channels": lambda hf: _HIDDEN(hf) // _HEADS(hf),
        "add_bias_linear": lambda hf: hf.get("bias", False),
    },
    fixed={"normalization": "LayerNorm", "gated_linear_unit": False},
    max_position_embeddings=lambda hf: hf.get("max_position_embeddings", 2048),
    activation=lambda hf: hf.get("activation", "gelu"),
    rope=_rope,
    swaps=(
        Swap("", "block.ParallelLayer", _is_parallel),
        Swap("pre_mlp_layernorm", "block.NoNorm", _is_parallel),
        Swap("self_attention.core_attention", "attention.ScaledAlibiAttention", lambda hf: hf.get("alibi", False)),
    ),
    amendments=(Amendment("embedding.without_dropout"),),
    inert={
        **only(False, "apply_residual_connection_post_layernorm"),
        **only(1, "num_ln_in_parallel_attn"),
        **anything("multi_query", "ff_factor"),  # the new architecture has num_kv_heads and ffn_hidden_size instead
    },
    # Queries, keys and values per group, as in megatron-core.
    weights=tuple(rule for rule in BLOOM.weights if not rule.internal.startswith("embedding.norm.")),
)

_NORMS = {"input_layernorm": "ln_attn", "pre_mlp_layernorm": "ln_mlp"}

FALCON_40B = replace(
    FALCON,
    name="falcon-40b",
    models="Falcon 40B, 180B",
    special="attention and MLP side by side under a LayerNorm each, grouped queries",
    matches=_two_norms,
    swaps=tuple(swap for swap in FALCON.swaps if swap.at != "pre_mlp_layernorm"),
    inert={**FALCON.inert, **only(2, "num_ln_in_parallel_attn")},
    weights=(
        *(rule for rule in FALCON.weights if not rule.internal.startswith(tuple(M + norm for norm in _NORMS))),
        *copies(_NORMS, M, H),
    ),
)
