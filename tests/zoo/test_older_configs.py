"""Configs as transformers writes them today, and as they were published, say the same model.

The published values are those of the model cards' config.json files, from memory and from the descriptions that other
projects quote.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from megatron_patch.family import Architecture
from megatron_patch.models import family_for

_RW: dict[str, Any] = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["RWForCausalLM"],
    "attention_dropout": 0.0,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 65024,
}
_SEVEN = {"hidden_size": 4544, "multi_query": True}
_FORTY = {"hidden_size": 8192}
_GPTJ = dict(rotary=True, scale_attn_weights=True, summary_type="cls_index", gradient_checkpointing=False)
_GALACTICA = dict(activation_dropout=0.0, learned_embeddings=True, scale_embeddings=False, layerdrop=0.0)

# What was published, and what transformers makes of it.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "falcon-7b": (
        {**_RW, **_SEVEN, "model_type": "RefinedWebModel", "n_head": 71, "n_layer": 32},
        {"model_type": "falcon"},
    ),
    "falcon-40b": (
        {**_RW, **_FORTY, "model_type": "RefinedWeb", "n_head": 128, "n_head_kv": 8, "n_layer": 60},
        {
            **_FORTY,
            "model_type": "falcon",
            "num_attention_heads": 128,
            "num_kv_heads": 8,
            "num_hidden_layers": 60,
            "new_decoder_architecture": True,
        },
    ),
    "gpt-j-6b": ({**AutoConfig.for_model("gptj").to_dict(), **_GPTJ}, {"model_type": "gptj"}),
    "galactica": ({**AutoConfig.for_model("opt").to_dict(), **_GALACTICA}, {"model_type": "opt"}),
}
_GLM_9B: dict[str, Any] = dict(
    attention_bias=True,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=13696,
    max_position_embeddings=131072,
    num_attention_heads=32,
    num_hidden_layers=40,
    num_key_value_heads=2,
    rms_norm_eps=1.5625e-07,
    vocab_size=151552,
)
PAIRS |= {
    kind: ({"model_type": kind, **_GLM_9B, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}, {"model_type": kind})
    for kind in ("glm", "glm4")
}


def _described(values: dict[str, Any]) -> Architecture:
    return family_for(values).describe(values)


@pytest.mark.parametrize("name", PAIRS)
def test_an_older_config_says_the_same_model(name: str) -> None:
    old, values = PAIRS[name]
    found, wanted = _described(old), _described(AutoConfig.for_model(**values).to_dict())
    assert found == wanted


def test_half_of_a_head_turns_where_the_config_is_silent() -> None:
    rope = _described({"model_type": "glm", **_GLM_9B}).rope
    assert rope is not None and rope.fraction == 0.5


@pytest.mark.parametrize(("norms", "name"), [(None, "falcon-40b"), (2, "falcon-40b"), (1, "falcon")])
def test_the_number_of_norms_tells_the_two_formats_of_the_new_architecture_apart(norms: int | None, name: str) -> None:
    values = {**PAIRS["falcon-40b"][1], "num_ln_in_parallel_attn": norms}
    assert _described(AutoConfig.for_model(**values).to_dict()).family.name == name
