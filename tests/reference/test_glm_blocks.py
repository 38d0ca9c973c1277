"""The plain GLM (block infilling) has the published names and shapes, and does what its formula says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.reference.glm_blocks import TINY, Reference, ids, layout, make, visible

PUBLISHED = json.loads((Path(__file__).parents[1] / "published" / "glm-10b.json").read_text())
SOP, MASK, GMASK, SMASK = (TINY["base"][f"{name}_token_id"] for name in ("sop", "mask", "gmask", "smask"))


def shapes(config: dict) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in Reference(config).state_dict().items()}


@pytest.mark.parametrize(("architecture", "prefix"), [("GLMModel", ""), ("GLMForConditionalGeneration", "glm.")])
def test_the_tensors_are_those_of_glm_10b(architecture: str, prefix: str) -> None:
    layers = range(*PUBLISHED["ranges"]["*"][0])
    expected = {prefix + k.replace("*", str(n)): shape for k, shape in PUBLISHED["tensors"].items() for n in layers}
    assert shapes({**PUBLISHED["config"], "architectures": [architecture]}) == expected


def test_glm_10b_has_ten_billion_parameters() -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Reference(PUBLISHED["config"]).parameters())
    assert count == 9_880_682_496


@pytest.mark.parametrize(
    ("row", "positions", "blocks", "sep"),
    [
        ([5, MASK, 6, 7, SOP, 8, 9], [0, 1, 2, 3, 1, 1, 1], [0, 0, 0, 0, 1, 2, 3], 4),
        ([5, 6, GMASK, SOP, 8], [0, 1, 2, 2, 2], [0, 0, 0, 1, 2], 3),
        ([GMASK, 6, MASK, SMASK, SOP, SOP, MASK], [0, 1, 2, 3, 0, 0, 0], [0, 0, 0, 0, 1, 2, 3], 4),
        ([5, MASK, 6], [0, 1, 2], [0, 0, 0], 0),
    ],
)
def test_positions_stay_at_the_first_mask_and_block_positions_count_from_sop(
    row: list[int], positions: list[int], blocks: list[int], sep: int
) -> None:
    assert layout(row, TINY["base"]) == (positions, blocks, sep)


def test_a_sop_without_a_mask_before_it_is_refused() -> None:
    with pytest.raises(ValueError, match="sop at 1"):
        layout([5, SOP, MASK], TINY["base"])


def test_the_context_sees_itself_and_the_piece_looks_back() -> None:
    assert visible(4, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("variant", TINY)
def test_a_later_token_changes_the_context_only_when_it_is_part_of_it(variant: str) -> None:
    model, row = make(variant), torch.tensor([[5, GMASK, 6, 7, SOP, 8, 9, 10]])
    context, piece = row.clone(), row.clone()
    context[0, 3], piece[0, 6] = 11, 11
    plain = model(row)
    assert not torch.allclose(model(context)[0, :3], plain[0, :3], atol=1e-3)
    torch.testing.assert_close(model(piece)[0, :6], plain[0, :6])
    assert not torch.allclose(model(piece)[0, 6:], plain[0, 6:], atol=1e-3)


def test_attention_scale_changes_no_logit_and_the_prefix_no_weight() -> None:
    row = ids("base", 3, 12)
    torch.testing.assert_close(make("scaled")(row), make("base")(row), atol=2e-5, rtol=0)
    torch.testing.assert_close(make("prefixed")(row), make("base")(row))


@pytest.mark.parametrize("name", ["position_embeddings", "block_position_embeddings"])
def test_both_position_tables_matter(name: str) -> None:
    model, row = make("base"), ids("base", 3, 12)
    before = model(row)
    with torch.no_grad():
        getattr(model.transformer, name).weight[2].neg_()  # (a constant would vanish in the layer norms)
    assert not torch.allclose(model(row), before, atol=1e-3)


def test_a_head_of_query_key_value_is_a_slice_of_each_third() -> None:
    model, row = make("base"), ids("base", 2, 8)
    attention, x = model.transformer.layers[0].attention, torch.randn(1, 1, 48)
    # With one token, attention passes its value through: the last third alone decides.
    expected = attention.dense(x @ attention.query_key_value.weight[96:].T + attention.query_key_value.bias[96:])
    torch.testing.assert_close(attention(x, torch.ones(1, 1, 1, dtype=torch.bool)), expected)
    assert model(row).shape == (2, 8, 200) and model(row).dtype == torch.float32


def test_made_ids_have_one_mask_before_one_sop_at_places_of_their_own() -> None:
    rows = ids("base", 6, 16).tolist()
    seps = [layout(row, TINY["base"])[2] for row in rows]
    assert all(row.count(SOP) == 1 and sum(row.count(m) for m in (MASK, GMASK, SMASK)) == 1 for row in rows)
    assert len(set(seps)) > 2 and 0 not in seps
