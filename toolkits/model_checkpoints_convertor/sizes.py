"""How many parameters a name such as llama2-13b promises, and about how many a config.json makes.

The promise is what positional scripts are given as MODEL_SIZE or MN; it is never the source of truth, only compared
with the config. The estimate counts the large matrices of a decoder and knows no family by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOLERANCE = 0.4
"""A promise may be off by this share: names round, and leave out embeddings."""

_SIZE = re.compile(
    r"(?:(?<![\w.])(?P<times>\d+)x|(?<![A-Za-z0-9])(?P<active>[Aa])|(?<![\d.]))"
    r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[bBmM])(?![A-Za-z0-9])"
)
_UNITS = {"b": 1e9, "m": 1e6}


@dataclass(frozen=True)
class Promise:
    """What a name says about a model's size."""

    parameters: float
    active: bool
    """Whether it counts only the experts that one token meets, as A3B does."""


def promised(name: str) -> Promise | None:
    """The last size in a name (7B, llama2-13b, qwen1.5-0.5b, 8x7B, A2.4B, 560m); None if there is none."""
    found = list(_SIZE.finditer(name))
    if not found:
        return None
    match = found[-1]
    count = int(match["times"] or 1) * float(match["number"]) * _UNITS[match["unit"].lower()]
    return Promise(count, bool(match["active"]))


def estimated(config: Mapping[str, Any], active: bool = False) -> float | None:
    """About how many parameters a Hugging Face config.json makes; `active`: of those, how many one token meets.

    None where a field is missing that it takes.
    """
    config = {**config, **(config.get("text_config") or {})}
    hidden, layers = _first(config, "hidden_size", "n_embd", "d_model"), _first(config, "num_hidden_layers", "n_layer")
    layers, vocabulary = layers or config.get("num_layers"), _first(config, "vocab_size", "padded_vocab_size")
    if not (hidden and layers and vocabulary):
        return None
    dense = config.get("first_k_dense_replace") or 0
    mlp = dense * _dense_mlp(config, hidden) + (layers - dense) * _mlp(config, hidden, active)
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return float(layers * _attention(config, hidden) + mlp + embeddings)


def mismatch(name: str, config: Mapping[str, Any]) -> str:
    """Why a name does not fit a config, for a person; empty if it does, or if it cannot be told."""
    promise = promised(name)
    count = estimated(config, promise.active) if promise else None
    if not promise or not count or abs(count - promise.parameters) <= TOLERANCE * promise.parameters:
        return ""
    kind = "active parameters" if promise.active else "parameters"
    return f"promises {rounded(promise.parameters)} {kind}, but config.json makes about {rounded(count)}"


def rounded(count: float) -> str:
    """6.74B, 135M, 83,700."""
    unit = next((unit for unit in ("B", "M") if count >= _UNITS[unit.lower()]), "")
    return f"{count / _UNITS[unit.lower()]:.3g}{unit}" if unit else f"{count:,.0f}"


def num_experts(config: Mapping[str, Any]) -> int:
    """Routed experts of a layer; 0 for a dense model."""
    return _first(config, "num_experts", "num_local_experts", "n_routed_experts") or 0


def experts_topk(config: Mapping[str, Any]) -> int:
    """How many experts a token meets; 0 for a dense model."""
    return _first(config, "num_experts_per_tok", "moe_topk") or 0


def moe_width(config: Mapping[str, Any]) -> int:
    """Width of one expert."""
    return _first(config, "moe_intermediate_size", "intermediate_size") or 0


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name)), None)


def _attention(config: Mapping[str, Any], hidden: int) -> int:
    heads = _first(config, "num_attention_heads", "n_head", "num_heads") or 1
    if rank := config.get("kv_lora_rank"):  # latent attention: low-rank projections in place of q, k and v
        rope, value = config.get("qk_rope_head_dim") or 0, config.get("v_head_dim") or 0
        nope, q_rank = config.get("qk_nope_head_dim") or 0, config.get("q_lora_rank")
        query = q_rank * (hidden + heads * (nope + rope)) if q_rank else hidden * heads * (nope + rope)
        return query + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    groups = _first(config, "num_key_value_heads", "num_kv_heads", "multi_query_group_num") or heads
    if config.get("multi_query") and not config.get("new_decoder_architecture"):  # it decides over num_kv_heads
        groups = 1
    dim = _first(config, "head_dim", "kv_channels") or hidden // heads
    return hidden * dim * (2 * heads + 2 * groups)


def _matrices(config: Mapping[str, Any]) -> int:
    """Of an MLP: gate, up and down, or only up and down."""
    activation = str(_first(config, "hidden_act", "activation_function") or "")
    return 3 if activation in ("silu", "swiglu") or "rms_norm_eps" in config else 2


def _dense_mlp(config: Mapping[str, Any], hidden: int) -> int:
    width = _first(config, "intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim") or 4 * hidden
    return _matrices(config) * hidden * width


def _mlp(config: Mapping[str, Any], hidden: int, active: bool) -> int:
    experts = num_experts(config)
    if not experts:
        return _dense_mlp(config, hidden)
    width = moe_width(config)
    shared = config.get("shared_expert_intermediate_size") or (config.get("n_shared_experts") or 0) * width
    return _matrices(config) * hidden * (width * (experts_topk(config) if active else experts) + shared)
