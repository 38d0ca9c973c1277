"""The Qwen 1.0 reference against the published names and shapes, and against facts worked out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.reference import qwen

FACTS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "published" / "qwen-7b.json").read_text())


def _ids(length: int) -> Tensor:
    return torch.randint(200, (2, length), generator=torch.Generator().manual_seed(7))


def _contracted(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {re.sub(r"\.\d+\.", ".*.", key): list(value.shape) for key, value in state.items()}


def test_names_shapes_and_bytes_are_those_of_the_published_checkpoint() -> None:
    with torch.device("meta"):
        state = qwen.Reference(FACTS["config"]).state_dict()
    assert _contracted(state) == FACTS["tensors"]
    assert 2 * sum(value.numel() for value in state.values()) == FACTS["total_size"]


@pytest.mark.parametrize("variant", qwen.TINY)
def test_tiny_models_have_the_tensors_and_the_config_fields_of_the_published_one(variant: str) -> None:
    assert set(_contracted(qwen.make(variant).state_dict())) == set(FACTS["tensors"])
    assert set(qwen.TINY[variant]) == set(FACTS["config"])


@pytest.mark.parametrize("variant", qwen.TINY)
def test_a_later_token_changes_no_earlier_logit(variant: str) -> None:
    model, ids = qwen.make(variant), _ids(40)
    other = ids.clone()
    other[:, 30] = (other[:, 30] + 1) % 200
    difference_S = (model(ids) - model(other)).abs().amax((0, 2))
    assert difference_S[:30].max() < 1e-6 and difference_S[30:].min() > 1e-4


def test_alpha_rises_in_steps_beyond_the_trained_length() -> None:
    steps = {1: 1, 8: 1, 16: 1, 17: 3, 32: 3, 33: 7, 64: 7, 65: 15}
    assert {length: qwen.ntk_alpha(length, 16) for length in steps} == steps


def test_logn_factors_are_one_up_to_the_trained_length_and_logarithms_beyond() -> None:
    factors_S = qwen.logn_factors(64, 16)
    assert torch.equal(factors_S[:16], torch.ones(16))
    torch.testing.assert_close(factors_S[[31, 63]], torch.tensor([1.25, 1.5]))
    assert factors_S[16] > 1


def test_alpha_stretches_the_base_to_the_power_that_keeps_the_fastest_pair() -> None:
    torch.testing.assert_close(qwen.rotary_frequencies(6, 1000.0, 1.0), torch.tensor([1.0, 0.1, 0.01]))
    # With base x alpha^(d / (d - 2)) the slowest pair turns alpha times slower: 0.01 / 3.
    torch.testing.assert_close(qwen.rotary_frequencies(6, 1000.0, 3.0)[[0, 2]], torch.tensor([1.0, 0.01 / 3]))


def test_rotary_leaves_position_zero_alone_and_turns_the_first_pair_by_one_radian() -> None:
    x_BHSD = torch.tensor([1.0, 5.0, 2.0, 7.0]).expand(1, 1, 3, 4)
    turned_SD = qwen.rotate(x_BHSD, qwen.rotary_frequencies(4, 10000.0, 1.0))[0, 0]
    assert torch.equal(turned_SD[0], x_BHSD[0, 0, 0])
    cos, sin = torch.tensor(1.0).cos(), torch.tensor(1.0).sin()
    torch.testing.assert_close(turned_SD[1, 0::2], torch.stack((cos - 2 * sin, 2 * cos + sin)))


@pytest.mark.parametrize("variant", ["long", "ntk", "logn"])
def test_long_text_methods_act_only_in_eval_mode_and_beyond_the_trained_length(variant: str) -> None:
    model = qwen.make(variant)
    without = qwen.make(variant, use_dynamic_ntk=False, use_logn_attn=False)
    assert torch.equal(model(_ids(16)), without(_ids(16)))
    assert (model(_ids(40)) - without(_ids(40))).abs().max() > 1e-3
    assert torch.equal(model.train()(_ids(40)), without(_ids(40)))


@pytest.mark.parametrize("switched_off", ["use_dynamic_ntk", "use_logn_attn"])
def test_each_long_text_method_changes_the_logits_by_itself(switched_off: str) -> None:
    other = qwen.make("long", **{switched_off: False})
    assert (qwen.make("long")(_ids(40)) - other(_ids(40))).abs().max() > 1e-3


def test_earlier_logits_stand_while_alpha_stays_that_of_the_prompt() -> None:
    model, ids = qwen.make("long"), _ids(40)
    prompt = model(ids[:, :20])
    torch.testing.assert_close(model(ids, prompt_length=20)[:, :20], prompt)
    assert (model(ids)[:, :20] - prompt).abs().max() > 1e-3


def test_rows_of_c_attn_are_query_then_key_then_value() -> None:
    attention, x_BSE = qwen.make("plain").transformer.h[0].attn, torch.randn(1, 5, 48)
    weight, bias = attention.c_attn.weight, attention.c_attn.bias
    with torch.no_grad():
        weight[:48], bias[:48] = 0, 0  # No query: every token looks at all tokens before it alike.
    mean_BSE = x_BSE.cumsum(1) / torch.arange(1, 6)[:, None]
    value_BSE = F.linear(mean_BSE, weight[96:], bias[96:])
    torch.testing.assert_close(attention(x_BSE, alpha=1.0), attention.c_proj(value_BSE))


def test_the_first_rows_ask_and_the_second_rows_are_asked() -> None:
    # One head of which only component 1 is used: with this base its positions hardly turn it.
    config = dict(qwen.TINY["plain"], hidden_size=4, num_attention_heads=1, kv_channels=4, rotary_emb_base=1e12)
    weight_FE = torch.zeros(12, 4)
    weight_FE[1, 0] = weight_FE[5, 1] = 1
    weight_FE[8:] = torch.eye(4)
    attention = qwen.Attention(config)
    attention.load_state_dict(
        {"c_attn.weight": weight_FE, "c_attn.bias": torch.zeros(12), "c_proj.weight": torch.eye(4)}
    )
    output_SE = attention(torch.tensor([[[0.0, 1, 0, 0], [1, 0, 0, 0]]]), alpha=1.0)[0]
    # The second token asks with 1, the first is asked with 1, the second with 0.
    weight = torch.tensor(0.5).sigmoid()
    torch.testing.assert_close(output_SE[1, :2], torch.stack((1 - weight, weight)))


def test_w2_is_the_gate_and_half_of_intermediate_size_is_the_width() -> None:
    mlp = qwen.MLP(dict(hidden_size=1, intermediate_size=2, no_bias=True))
    for layer, value in ((mlp.w1, -3.0), (mlp.w2, 2.0), (mlp.c_proj, 1.0)):
        torch.nn.init.constant_(layer.weight, value)
    torch.testing.assert_close(mlp(torch.ones(1, 1, 1)), F.silu(torch.full((1, 1, 1), 2.0)) * -3)


@pytest.mark.parametrize("changes", [dict(kv_channels=8), dict(rotary_pct=0.5)])
def test_what_no_published_checkpoint_has_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}="):
        qwen.make("long", **changes)
