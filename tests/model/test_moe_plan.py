"""What is known of a mixture of experts without running it: its config, its layouts, its size, its names on meta."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_patch.model import check_layout, flops_per_token
from megatron_patch.models import family_for
from tests.tiny import MOE, hf_moe

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "deepseek_v3_config.json").read_text())


def describe(values: dict[str, Any], **changes: Any) -> Any:
    values = {**values, **changes}
    return family_for(values).describe(values)


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("variant", "change", "words"),
    [
        ("mixtral", dict(use_sliding_window=True), "use_sliding_window=True"),
        ("mixtral", dict(output_router_logits=True), "output_router_logits=True"),
        ("mixtral", dict(router_jitter_noise=0.1), "router_jitter_noise=0.1"),
        ("mixtral", dict(quantization_config={"bits": 4}), "quantization_config"),
        ("deepseek", dict(attention_bias=True), "attention_bias=True"),
        ("deepseek", dict(topk_method="greedy"), "topk_method='greedy'"),
        ("deepseek", dict(scoring_func="softmax"), "scoring_func='softmax'"),
        ("deepseek", dict(norm_topk_prob=False), "norm_topk_prob=False"),
        ("deepseek", dict(rope_interleave=False), "rope_interleave=False"),
        ("deepseek", dict(topk_group=3), "num_experts_per_tok=4 must be twice topk_group=3"),
        ("deepseek", dict(num_key_value_heads=4), "num_key_value_heads=4 must equal num_attention_heads=8"),
        ("deepseek", dict(head_dim=6), "head_dim=6 must equal qk_rope_head_dim=4"),
        ("deepseek", dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_type='linear' is not supported here"),
        ("deepseek", dict(rope_scaling=dict(type="yarn", factor=2.0, mscale=1.0)), "both or neither"),
        ("deepseek", dict(rope_scaling=dict(type="yarn", factor=2.0, truncate=False)), "truncate=False"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(variant: str, change: dict[str, Any], words: str) -> None:
    values = {
        name: value
        for name, value in hf_config(variant).items()
        if not ("rope_scaling" in change and name == "rope_parameters")
    }
    with pytest.raises(ValueError, match=words):
        describe(values, **change)


def hf_config(variant: str) -> dict[str, Any]:
    from transformers import AutoConfig

    return AutoConfig.for_model(**MOE[variant]).to_dict()


@pytest.mark.parametrize("variant", MOE)
def test_every_field_that_transformers_writes_is_understood(variant: str) -> None:
    assert describe(hf_config(variant)).plan_only == ""


def test_quantized_weights_may_be_planned_and_the_reason_against_more_is_given() -> None:
    assert "weights are in fp8; cast them to bfloat16 first" in describe(PUBLISHED).plan_only
    assert describe(PUBLISHED, quantization_config=None).plan_only == ""


def test_copies_inside_multi_token_prediction_are_known_for_what_they_are() -> None:
    assert describe(PUBLISHED).repeats == {
        "model.layers.61.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight": "lm_head.weight",
    }
    assert describe(PUBLISHED, num_nextn_predict_layers=0).repeats == {}
    assert describe(hf_config("mixtral"), tie_word_embeddings=True).repeats == {
        "lm_head.weight": "model.embed_tokens.weight"
    }


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (
            dict(expert_model_parallel_size=3),
            "expert_model_parallel_size=3 does not divide num_moe_experts=256; choose 1, 2, 4",
        ),
        (dict(expert_tensor_parallel_size=3), "expert_tensor_parallel_size=3 does not divide moe_ffn_hidden_size=2048"),
        (dict(pipeline_model_parallel_size=16), "=16 does not divide num_layers=61; choose 1 or 61"),
        (
            dict(pipeline_model_parallel_size=16, num_layers_in_last_pipeline_stage=2),
            "num_layers_in_last_pipeline_stage=2 leaves 59 of num_layers=61 for 15 stages, which must divide them",
        ),
        (
            dict(
                pipeline_model_parallel_size=16,
                virtual_pipeline_model_parallel_size=2,
                num_layers_in_first_pipeline_stage=3,
                num_layers_in_last_pipeline_stage=2,
            ),
            "parallel_size=2 does not divide num_layers_in_first_pipeline_stage=3; choose 1 or 3",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_the_choices(layout: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_layout(describe(PUBLISHED), **layout)


@pytest.mark.parametrize(
    "layout",
    [
        dict(tensor_model_parallel_size=8, expert_model_parallel_size=8, expert_tensor_parallel_size=1),
        dict(
            pipeline_model_parallel_size=16,
            num_layers_in_first_pipeline_stage=3,
            num_layers_in_last_pipeline_stage=2,
        ),
        dict(pipeline_model_parallel_size=16, num_layers_in_last_pipeline_stage=1),
        dict(pipeline_model_parallel_size=16, pipeline_model_parallel_layout="any"),
    ],
)
def test_a_layout_that_fits_is_accepted(layout: dict[str, Any]) -> None:
    check_layout(describe(PUBLISHED), **layout)


def test_expert_parallelism_needs_experts() -> None:
    with pytest.raises(ValueError, match="expert_model_parallel_size=2, but the model has no experts; choose 1"):
        check_layout(describe({**hf_config("mixtral"), "model_type": "llama"} | DENSE), expert_model_parallel_size=2)


DENSE: dict[str, Any] = dict.fromkeys(
    ("num_local_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
)


# ---------------------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize("variant", ["mixtral", "deepseek", "deepseek_plain_query"])
def test_flops_count_the_experts_that_a_token_meets(variant: str) -> None:
    model = hf_moe(variant)
    c, values = MOE[variant], model.config.to_dict()
    share = c["num_experts_per_tok"] / (c.get("num_local_experts") or c["n_routed_experts"])
    weights = sum(
        p.numel() * (share if ".experts." in name else 1)
        for name, p in model.named_parameters()
        if p.dim() >= 2 and "embed" not in name
    )
    latent = "qk_nope_head_dim" in c
    channels = c["qk_nope_head_dim"] + c["qk_rope_head_dim"] + c["v_head_dim"] if latent else 2 * c["head_dim"]
    scores = 6 * c["num_hidden_layers"] * c["num_attention_heads"] * channels * 32
    assert flops_per_token(describe(values), 32) == 6 * weights + scores


# ------------------------------------------------------------------------------------------------------------- on meta


def names_on_meta(rank: int, world_size: int, values: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Name -> shape and attributes of every parameter, of a model on the meta device; buffers have no attributes."""
    return _names(values, "meta")


def names_on_both(rank: int, world_size: int, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return _names(values, "meta"), _names(values, "cpu")


def _names(values: dict[str, Any], device: str) -> dict[str, tuple[Any, ...]]:
    from megatron.core import parallel_state

    from megatron_patch.model import build_model, transformer_config

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    architecture = describe(values)
    with torch.device(device):
        config = transformer_config(architecture, use_cpu_initialization=True)
        model = build_model(architecture, config, make_vocab_size_divisible_by=1)
    parameters = {name: p.__dict__ for name, p in model.named_parameters()}
    tensors = {name: one for name, one in model.state_dict().items() if isinstance(one, torch.Tensor)}
    return {name: (tuple(one.shape), parameters.get(name)) for name, one in tensors.items()}


@pytest.mark.parametrize("variant", ["mixtral", "deepseek"])
def test_a_model_on_meta_has_the_names_shapes_and_attributes_of_a_real_one(variant: str, pool: Any) -> None:
    planned, real = pool.run(names_on_both, 1, hf_config(variant))[0]
    assert planned == real
    assert len(planned) > 80


def test_the_published_deepseek_v3_has_the_size_that_its_authors_state(pool: Any) -> None:
    from megatron_patch.weights import claim

    shapes = {name: shape for name, (shape, _) in pool.run(names_on_meta, 1, PUBLISHED)[0].items()}
    size = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    extra = sum(count for name, count in size.items() if name.startswith("mtp."))
    assert round((sum(size.values()) - extra) / 1e9) == 671
    assert round((extra - size["mtp.layers.0.eh_proj.weight"]) / 1e9, 1) == 11.5
    architecture = describe(PUBLISHED)
    claims = claim(architecture.family.weights, shapes, architecture.num_layers)
    hf = {name: shape for one in claims for name, shape in zip(one.hf, one.hf_shapes(architecture), strict=True)}
    assert hf["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert hf["model.layers.61.shared_head.norm.weight"] == (7168,)
    assert hf["model.layers.60.mlp.experts.255.up_proj.weight"] == (2048, 7168)
    assert hf["model.layers.3.mlp.gate.e_score_correction_bias"] == (256,)
    assert hf["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert "model.layers.2.mlp.gate.weight" not in hf and "model.layers.3.mlp.up_proj.weight" not in hf
