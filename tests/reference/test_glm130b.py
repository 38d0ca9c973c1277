"""The plain GLM-130B has the published names and shapes, and does what its formula says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu

from tests.reference.glm130b import MLP, TINY, Attention, Reference, ids, layout, make, rotate, visible

PUBLISHED = json.loads((Path(__file__).parents[1] / "published" / "glm-130b.json").read_text())
SOP, MASK, GMASK, SMASK = (TINY["base"][f"{name}_token_id"] for name in ("sop", "mask", "gmask", "smask"))


def test_the_tensors_are_those_of_glm_130b() -> None:
    layers = range(*PUBLISHED["ranges"]["*"][0])
    expected = {k.replace("*", str(n)): shape for k, shape in PUBLISHED["tensors"].items() for n in layers}
    with torch.device("meta"):
        state = Reference(PUBLISHED["config"]).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == expected
    # 4 h^2 of attention and 3 * 8/3 h^2 of GEGLU in 70 layers, one embedding table: what the name rounds up.
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e9, 1) == 128.7


@pytest.mark.parametrize(
    ("row", "positions", "sep"),
    [
        ([5, MASK, 6, SOP, 8, 9], [0, 1, 2, 1, 1, 1], 3),
        ([5, SMASK, MASK, SOP, 8], [0, 1, 2, 2, 2], 3),
        ([5, SMASK, GMASK, SOP, 8], [0, 1, 2, 1, 1], 3),
        ([5, 6, GMASK, SOP, 8, SOP], [0, 1, 2, 3, 4, 5], 3),
        ([5, GMASK, SOP, 8, MASK], [0, 1, 2, 3, 4], 2),
        ([5, 6, 7], [0, 1, 2], 0),
    ],
)
def test_a_mask_holds_the_position_and_a_gmask_counts_on(row: list[int], positions: list[int], sep: int) -> None:
    assert layout(row, TINY["base"]) == (positions, sep)


def test_the_context_sees_itself_and_the_piece_looks_back() -> None:
    assert visible(4, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_position_zero_is_not_turned_and_a_quarter_turn_moves_a_into_b() -> None:
    x = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(rotate(x, torch.zeros(1, 1)), x)
    torch.testing.assert_close(rotate(x, torch.full((1, 1), torch.pi / 2)).flatten(), torch.tensor([-2.0, 1.0]))


def test_the_rotary_speeds_fall_by_powers_of_the_base() -> None:
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4)
    turned = rotate(x, torch.full((1, 1), 3.0)).flatten()
    torch.testing.assert_close(turned[:2], torch.tensor([3.0, 0.03]).cos())
    torch.testing.assert_close(turned[2:], torch.tensor([3.0, 0.03]).sin())


def test_query_key_value_is_laid_out_head_by_head() -> None:
    attention, x = Attention(48, 8), torch.randn(1, 1, 48)
    # With one token, attention passes its value through: the last six of every head's eighteen rows.
    value = attention.query_key_value(x).view(8, 18)[:, 12:].reshape(1, 1, 48)
    seen = torch.ones(1, 1, 1, dtype=torch.bool)
    torch.testing.assert_close(attention(x, torch.zeros(1, 1), seen), attention.dense(value))


def test_the_second_half_of_the_mlp_is_the_gate() -> None:
    mlp, x = MLP(48, 128), torch.randn(2, 48)
    value, gate = mlp.dense_h_to_4h(x)[:, :128], mlp.dense_h_to_4h(x)[:, 128:]
    torch.testing.assert_close(mlp(x), mlp.dense_4h_to_h(value * gelu(gate)))


@pytest.mark.parametrize(("variant", "alpha"), [("base", 8**0.5), ("odd", 6**0.5)])
def test_the_residual_is_the_normed_input_times_alpha(variant: str, alpha: float) -> None:
    layer = make(variant).transformer.layers[0]
    with torch.no_grad():
        for silent in (layer.attention.dense, layer.mlp.dense_4h_to_h):
            silent.weight.zero_()
            silent.bias.zero_()
    x, seen = torch.randn(1, 3, 48), visible(3, 0)[None]
    expected = alpha * layer.post_attention_layernorm(alpha * layer.input_layernorm(x))
    torch.testing.assert_close(layer(x, torch.arange(3)[None], seen), expected)


@pytest.mark.parametrize("variant", TINY)
def test_a_later_token_changes_the_context_only_when_it_is_part_of_it(variant: str) -> None:
    model, row = make(variant), torch.tensor([[5, GMASK, 6, 7, SOP, 8, 9, 10]])
    context, piece = row.clone(), row.clone()
    context[0, 3], piece[0, 6] = 11, 11
    plain = model(row)
    assert not torch.allclose(model(context)[0, :3], plain[0, :3], atol=1e-3)
    torch.testing.assert_close(model(piece)[0, :6], plain[0, :6])
    assert not torch.allclose(model(piece)[0, 6:], plain[0, 6:], atol=1e-3)


def test_mask_and_gmask_place_the_same_piece_differently() -> None:
    model, row = make("base"), torch.tensor([[5, GMASK, 6, SOP, 8, 9]])
    with torch.no_grad():
        weight = model.transformer.word_embeddings.weight
        weight[GMASK] = weight[MASK]
    held = torch.where(row == GMASK, MASK, row)
    assert not torch.allclose(model(held), model(row), atol=1e-3)


def test_made_ids_have_one_mask_before_one_sop_at_places_of_their_own() -> None:
    rows = ids("base", 6, 16).tolist()
    seps = [layout(row, TINY["base"])[1] for row in rows]
    assert all(row.count(SOP) == 1 and sum(row.count(m) for m in (MASK, GMASK, SMASK)) == 1 for row in rows)
    assert len(set(seps)) > 2 and 0 not in seps
