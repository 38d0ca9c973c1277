"""A config.json is translated whole: every field is honoured, known to be inert, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from megatron_patch.model import check_layout, flops_per_token, padded_vocab_size, transformer_config
from megatron_patch.models import family_for

BASE = LlamaConfig(num_hidden_layers=6, hidden_size=96, intermediate_size=128, num_attention_heads=12).to_dict()


def describe(**changes: Any) -> Any:
    values = {**BASE, **changes}
    return family_for(values).describe(values)


def test_every_field_that_transformers_writes_is_understood() -> None:
    architecture = describe()
    assert architecture.config["num_query_groups"] == 12
    assert architecture.config["kv_channels"] == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(sliding_window=128), "sliding_window=128"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(hidden_act="swish2"), "hidden_act='swish2' is not supported; choose one of silu"),
        (dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4)), "rope_type='longrope' is not supported"),
        (dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4)), "rope_type='linear' needs factor"),
        (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "partial_rotary_factor"),
        (dict(rope_interleaved=True), "rope_interleaved=True"),
        (dict(hidden_size=None), "'hidden_size' is missing"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        transformer_config(describe(**change))


def test_an_unknown_model_type_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="model_type='mamba' belongs to no known family; known: llama"):
        family_for({"model_type": "mamba"})


@pytest.mark.parametrize(
    "old",
    [
        dict(rope_theta=500000.0),
        dict(rope_theta=500000.0, rope_scaling=None),
        dict(rope_theta=500000.0, rope_scaling={"type": "linear", "factor": 2.0}),
    ],
)
def test_configs_of_older_transformers_read_the_same(old: dict[str, Any]) -> None:
    values = {name: value for name, value in BASE.items() if name != "rope_parameters"}
    rope = family_for(values).describe({**values, **old}).rope
    assert rope.rope_theta == 500000.0
    assert rope.rope_type == ("linear" if old.get("rope_scaling") else "default")


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (dict(tensor_model_parallel_size=5), "=5 does not divide num_attention_heads=12 .* choose 1, 2, 3, 4, 6 or 12"),
        (dict(pipeline_model_parallel_size=4), "=4 does not divide num_layers=6; choose 1, 2, 3 or 6"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_the_choices(layout: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_layout(describe(), **layout)


def test_groups_must_divide_the_tensor_parallel_size_or_be_divided_by_it() -> None:
    with pytest.raises(ValueError, match="num_query_groups=4; choose 1, 2, 4 or 12"):
        check_layout(describe(num_key_value_heads=4), tensor_model_parallel_size=3)
    check_layout(describe(num_key_value_heads=2), tensor_model_parallel_size=4)


@pytest.mark.parametrize(("size", "tensor", "padded"), [(49152, 3, 49152), (32000, 1, 32000), (32001, 2, 32256)])
def test_the_vocabulary_is_padded_to_a_multiple(size: int, tensor: int, padded: int) -> None:
    assert padded_vocab_size(size, tensor) == padded


def test_flops_count_the_weights_of_matrix_products() -> None:
    from tests.tiny import hf_llama

    model = hf_llama()
    config = model.config.to_dict()
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    attention = 12 * 4 * 8 * 6 * 32
    assert flops_per_token(family_for(config).describe(config), 32) == 6 * weights + attention
