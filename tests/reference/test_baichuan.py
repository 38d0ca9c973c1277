"""The Baichuan reference against the published names and shapes, and against facts worked out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.reference import baichuan

PUBLISHED = Path(__file__).parents[1] / "published"
CHECKPOINTS = ("baichuan-7b", "baichuan2-7b-base", "baichuan2-13b-base")


def _published(name: str) -> dict[str, Any]:
    return json.loads((PUBLISHED / f"{name}.json").read_text())


def _ids(length: int = 12) -> Tensor:
    return torch.randint(200, (2, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_names_and_shapes_are_those_of_the_published_checkpoint(name: str) -> None:
    facts = _published(name)
    with torch.device("meta"):
        state = baichuan.Reference(facts["config"]).state_dict()
    assert {re.sub(r"\.\d+\.", ".*.", key): list(value.shape) for key, value in state.items()} == facts["tensors"]
    buffers = facts["config"]["num_hidden_layers"] * len(facts["ignored"])
    assert len(state) + buffers == facts["tensor_count"]


@pytest.mark.parametrize("variant", baichuan.TINY)
def test_tiny_models_have_the_tensors_of_the_published_ones(variant: str) -> None:
    names = {re.sub(r"\.\d+\.", ".*.", key) for key in baichuan.make(variant).state_dict()}
    assert names == set(_published("baichuan-7b")["tensors"])


@pytest.mark.parametrize(
    ("name", "rotary", "norm_head"),
    [("baichuan-7b", True, False), ("baichuan2-7b-base", True, True), ("baichuan2-13b-base", False, True)],
)
def test_fields_of_the_published_configs_tell_sizes_and_versions_apart(
    name: str, rotary: bool, norm_head: bool
) -> None:
    config = _published(name)["config"]
    assert (baichuan.is_rotary(config), baichuan.has_norm_head(config)) == (rotary, norm_head)
    config.pop("z_loss_weight", None)
    assert baichuan.has_norm_head(config) is norm_head, "revisions without z_loss_weight must read the same"


@pytest.mark.parametrize("variant", baichuan.TINY)
def test_a_later_token_changes_no_earlier_logit(variant: str) -> None:
    model, ids = baichuan.make(variant), _ids()
    other = ids.clone()
    other[:, 8] = (other[:, 8] + 1) % 200
    difference_S = (model(ids) - model(other)).abs().amax((0, 2))
    assert difference_S[:8].max() < 1e-6 and difference_S[8:].min() > 1e-4


def test_alibi_slopes_of_eight_heads_halve_and_those_of_six_interleave() -> None:
    assert baichuan.alibi_slopes(8) == [2.0**-power for power in range(1, 9)]
    assert baichuan.alibi_slopes(6) == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]


def test_alibi_takes_the_slope_off_once_for_each_token_of_distance() -> None:
    first_head_ST = baichuan.alibi_bias(8, 4)[0].tril()
    assert first_head_ST.tolist() == [[0, 0, 0, 0], [-0.5, 0, 0, 0], [-1, -0.5, 0, 0], [-1.5, -1, -0.5, 0]]


def test_rotary_leaves_position_zero_alone_and_turns_the_first_pair_by_one_radian() -> None:
    x_BHSD = torch.tensor([1.0, 5.0, 2.0, 7.0]).expand(1, 1, 3, 4)
    turned_SD = baichuan.rotate(x_BHSD)[0, 0]
    assert torch.equal(turned_SD[0], x_BHSD[0, 0, 0])
    cos, sin = torch.tensor(1.0).cos(), torch.tensor(1.0).sin()
    torch.testing.assert_close(turned_SD[1, 0::2], torch.stack((cos - 2 * sin, 2 * cos + sin)))


def test_rows_of_w_pack_are_query_then_key_then_value() -> None:
    attention, x_BSE = baichuan.make("7b").model.layers[0].self_attn, torch.randn(1, 5, 48)
    value_EE = attention.W_pack.weight[96:]
    with torch.no_grad():
        attention.W_pack.weight[:48] = 0  # No query: every token looks at all tokens before it alike.
    mean_BSE = x_BSE.cumsum(1) / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(attention(x_BSE), attention.o_proj(mean_BSE @ value_EE.T))


def test_the_first_rows_ask_and_the_second_rows_are_asked() -> None:
    attention = baichuan.Attention(dict(hidden_size=2, num_attention_heads=1))
    asks, is_asked, identity = [[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]], torch.eye(2).tolist()
    attention.load_state_dict(
        {"W_pack.weight": torch.tensor(asks + is_asked + identity), "o_proj.weight": torch.eye(2)}
    )
    output_SE = attention(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))[0]
    # The second token asks with 1, the first is asked with 1 at a distance of 1 (slope 1/256), the second with 0.
    weight = torch.tensor(2**-0.5 - 1 / 256).sigmoid()
    torch.testing.assert_close(output_SE[1], torch.stack((1 - weight, weight)))


def test_the_activation_is_on_the_gate() -> None:
    mlp = baichuan.MLP(dict(hidden_size=1, intermediate_size=1))
    for layer, value in ((mlp.gate_proj, 2.0), (mlp.up_proj, -3.0), (mlp.down_proj, 1.0)):
        torch.nn.init.constant_(layer.weight, value)
    torch.testing.assert_close(mlp(torch.ones(1, 1, 1)), F.silu(torch.full((1, 1, 1), 2.0)) * -3)


@pytest.mark.parametrize(("variant", "changes"), [("7b", True), ("13b", True), ("2-7b", False), ("2-13b", False)])
def test_only_a_norm_head_ignores_the_length_of_its_rows(variant: str, changes: bool) -> None:
    model, ids = baichuan.make(variant), _ids()
    before = model(ids)
    with torch.no_grad():
        model.lm_head.weight[5] *= 3
    assert bool((model(ids) - before).abs().max() > 1e-4) is changes


def test_the_z_loss_adds_the_mean_square_of_the_largest_logits_of_all_but_the_last_position() -> None:
    ids = _ids()
    plain, weighted = baichuan.make("2-13b", z_loss_weight=0), baichuan.make("2-13b", z_loss_weight=0.5)
    largest_BS = plain(ids).max(-1).values[:, :-1]
    torch.testing.assert_close(weighted.loss(ids) - plain.loss(ids), 0.5 * (largest_BS**2).mean())
