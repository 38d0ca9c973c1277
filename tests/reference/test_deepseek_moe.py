"""The plain DeepSeekMoE has the published names and shapes, and does what its formula says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

from tests.reference.deepseek_moe import TINY, Mixture, Reference, SwiGLU, make, rotate

PUBLISHED = json.loads((Path(__file__).parents[1] / "published" / "deepseek-moe-16b.json").read_text())
IDS = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(7))


def expanded(pattern: str) -> list[str]:
    """The names a pattern stands for; its `*` are filled from left to right."""
    ranges = PUBLISHED["ranges"].get(pattern, PUBLISHED["ranges"]["*"])[: pattern.count("*")]
    template = pattern.replace("*", "{}")
    return [template.format(*numbers) for numbers in itertools.product(*(range(*bounds) for bounds in ranges))]


def test_the_tensors_are_those_of_deepseek_moe_16b() -> None:
    expected = {name: shape for pattern, shape in PUBLISHED["tensors"].items() for name in expanded(pattern)}
    with torch.device("meta"):
        state = Reference(PUBLISHED["config"]).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == expected
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e9, 2) == 16.38


@pytest.mark.parametrize(
    ("variant", "dense"), [("base", [0]), ("odd", [0]), ("alternate", [0, 1, 3]), ("unshared", []), ("biased", [0])]
)
def test_the_dense_layers_are_where_the_config_says(variant: str, dense: list[int]) -> None:
    layers = make(variant).model.layers
    assert [number for number, layer in enumerate(layers) if isinstance(layer.mlp, SwiGLU)] == dense


@pytest.mark.parametrize("variant", ["base", "normed"])
def test_the_chosen_weigh_their_probability_or_sum_to_one(variant: str) -> None:
    mixture = make(variant).model.layers[1].mlp
    weights = mixture.weights(torch.randn(50, 48, generator=torch.Generator().manual_seed(0)))
    assert ((weights > 0).sum(-1) == 3).all()
    total = weights.sum(-1)
    assert torch.allclose(total, torch.ones(50)) == (variant == "normed")
    assert (total < 1 + 1e-6).all()


def test_a_mixture_is_the_weighted_sum_of_the_chosen_and_the_shared() -> None:
    mixture = make("base").model.layers[1].mlp
    assert isinstance(mixture, Mixture)
    x = torch.randn(48, generator=torch.Generator().manual_seed(0))
    best, chosen = torch.softmax(mixture.gate.weight @ x, 0).topk(3)
    expected = mixture.shared_experts(x)
    for p, e in zip(best, chosen.tolist(), strict=True):
        expert = mixture.experts[e]
        expected = expected + p * (
            expert.down_proj.weight @ (silu(expert.gate_proj.weight @ x) * (expert.up_proj.weight @ x))
        )
    torch.testing.assert_close(mixture(x), expected)


def test_the_shared_experts_are_one_wide_expert() -> None:
    assert make("base").model.layers[1].mlp.shared_experts.up_proj.weight.shape == (48, 48)
    assert make("unshared").model.layers[1].mlp.shared_experts is None


def test_routers_prefer_clearly() -> None:
    mixture, x = make("base").model.layers[2].mlp, torch.randn(100, 48, generator=torch.Generator().manual_seed(0))
    best = mixture.gate(x).softmax(-1).topk(4).values
    assert (best[:, 2] - best[:, 3]).median() > 0.01


@pytest.mark.parametrize("variant", TINY)
def test_a_later_token_changes_no_earlier_logit(variant: str) -> None:
    model, other = make(variant), IDS.clone()
    other[:, 7] = (other[:, 7] + 1) % 200
    before, after = model(IDS), model(other)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert not torch.allclose(after[:, 7:], before[:, 7:], atol=1e-3)


def test_the_first_place_is_not_turned_and_the_second_by_the_speeds() -> None:
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 2, 4)
    turned = rotate(x, 100.0)[0, 0]
    torch.testing.assert_close(turned[0], x[0, 0, 0])
    torch.testing.assert_close(turned[1], torch.cat([torch.tensor([1.0, 0.1]).cos(), torch.tensor([1.0, 0.1]).sin()]))


def test_grouped_keys_equal_keys_repeated_for_every_head() -> None:
    grouped = make("odd")
    whole = Reference({**TINY["odd"], "num_key_value_heads": 6}).eval()
    state = grouped.state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = tensor.view(2, 8, 48).repeat_interleave(3, dim=0).reshape(48, 48)
    whole.load_state_dict(state)
    torch.testing.assert_close(whole(IDS), grouped(IDS))
