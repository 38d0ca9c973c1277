"""Names in files: what Transformer Engine fuses is what megatron-core's own key maps say; names never collide."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

from megatron_patch.checkpoint.naming import READABLE, TE, naming_for, numbers_of
from tests.checkpoint.legacy_runs import CONFIGS, whole

model_of = cache(whole)


def core_key_map(model: Any, moe: bool) -> Mapping[str, str]:
    """megatron-core's own map from names of local layers to those of Transformer Engine's."""
    from megatron.core.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec

    from megatron_patch.checkpoint.whole import world_of_one
    from megatron_patch.model import transformer_config

    with world_of_one():
        config = transformer_config(model.architecture, use_cpu_initialization=True)
        spec = get_gpt_modelopt_spec(config, remap_te_layernorm=True)
    layer = spec.layer_specs[model.architecture.moe_layers.index(moe)]
    return layer.submodules.sharded_state_dict_keys_map


@pytest.mark.parametrize(
    ("variant", "moe"),
    [("gqa", False), ("biases", False), ("mixtral", True), ("deepseek", False), ("deepseek", True)],
)
def test_te_names_are_those_of_megatron_core(variant: str, moe: bool) -> None:
    model = model_of(variant)
    layer = f"decoder.layers.{model.architecture.moe_layers.index(moe)}."
    names = [name.removeprefix(layer) for name in model.claims if name.startswith(layer)]
    keys = core_key_map(model, moe)
    expected = {}
    for name in names:
        prefix = next((old for old in keys if name.startswith(old)), "")
        expected[name] = keys.get(prefix, "") + name.removeprefix(prefix)
    found = {name: TE.key(layer + name, numbers_of(layer + name), model.claims) for name in names}
    assert {name: key.removeprefix(layer) for name, key in found.items()} == expected


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("index", range(len(READABLE)))
def test_no_two_parameters_share_a_key(variant: str, index: int) -> None:
    naming, names = READABLE[index], model_of(variant).claims
    known = [name for name in names if naming.has(name)]
    keys = {naming.key(name, numbers_of(name), names) for name in known}
    assert len(keys) == len(known) > 0


def test_experts_of_one_module_are_numbered_at_the_end() -> None:
    name = "decoder.layers.7.mlp.experts.local_experts.5.linear_fc1.weight"
    assert naming_for("te", "grouped").key(name, [1, 2], [name]) == "decoder.layers.1.mlp.experts.linear_fc1.weight2"
    assert (
        naming_for("te").key(name, [1, 2], [name]) == "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"
    )


def test_norms_inside_of_multi_token_prediction_are_fused_too() -> None:
    layer = "mtp.layers.0.transformer_layer."
    names = [layer + "input_layernorm.weight", layer + "self_attention.linear_qkv.weight"]
    assert TE.key(names[0], [0], names) == layer + "self_attention.linear_qkv.layer_norm_weight"
    assert TE.key("mtp.layers.0.final_layernorm.weight", [0], names) == "mtp.layers.0.final_layernorm.weight"


@pytest.mark.parametrize(
    "name", ["decoder.layers.0.mlp.router.weight", "decoder.layers.0.self_attention.q_layernorm.weight"]
)
def test_a_parameter_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"naming='2023' has no name for the parameter {name}"):
        naming_for("2023").key(name, [0], [name])


@pytest.mark.parametrize(
    ("naming", "experts", "message"),
    [
        ("nemo", None, "naming='nemo' is not known; choose one of local, te, 2023"),
        ("te", "stacked", "expert_layout='stacked' is not known; choose one of sequential, grouped"),
        ("local", "grouped", "expert_layout='grouped' exists with naming='te' only, not 'local'"),
    ],
)
def test_a_scheme_that_does_not_exist_is_refused(naming: str, experts: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        naming_for(naming, experts)


def test_files_of_2023_have_no_extra_state() -> None:
    naming = naming_for("2023", None)
    model = model_of("gqa")
    assert {naming.extra_state(naming.key(name, numbers_of(name), model.claims)) for name in model.claims} == {None}
