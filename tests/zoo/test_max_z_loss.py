"""Max-z loss adds the square of each token's largest logit, wherever the vocabulary is split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_patch.checkpoint.convert import convert
from tests.reference import baichuan
from tests.zoo.runs import Layout, load

NAMES = {"output_layer.weight": "lm_head.weight", "decoder.final_layernorm.weight": "model.norm.weight"}
"""Whose gradients are compared: ours -> the reference's."""

IDS = torch.randint(200, (2, 17), generator=torch.Generator().manual_seed(3))


def loss_and_gradients(rank: int, world_size: int, root: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the mean loss over all next tokens; the output layer's rows are those of this rank."""
    model = load(root, Layout(world_size))
    positions = torch.arange(IDS.shape[1] - 1)[None].expand(2, -1)
    loss = model(IDS[:, :-1], positions, None, labels=IDS[:, 1:]).mean()
    loss.backward()
    parameters = dict(model.named_parameters())
    return loss.item(), {name: parameters[name].grad for name in NAMES}


def tied_largest(rank: int, world_size: int) -> torch.Tensor:
    """The gradient that each rank's logits get where both have the largest."""
    from megatron.core import parallel_state

    from megatron_patch.layers.head import _largest

    parallel_state.initialize_model_parallel(world_size, create_gloo_process_groups=False)
    logits_SBV = torch.tensor([[[1.0, 5.0, 2.0]]], requires_grad=True)
    largest = _largest(logits_SBV)
    largest.sum().backward()
    return torch.cat((logits_SBV.grad.flatten(), largest.detach().flatten()))


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, float, dict[str, torch.Tensor]]]:
    """A converted model whose z-loss weighs more than rounding can, and the reference's loss and gradients."""
    from tests.zoo.cases import Case

    folder: Path = tmp_path_factory.mktemp("max_z")
    config = {**baichuan.TINY["2-13b"], "z_loss_weight": 0.1}
    model = baichuan.make("2-13b", z_loss_weight=0.1)
    hf = Case(config, "baichuan.2-13b").save(model, folder / "hf")
    convert(hf, folder / "megatron")
    loss = model.loss(IDS)
    loss.backward()
    parameters = dict(model.named_parameters())
    yield str(folder / "megatron"), loss.item(), {name: parameters[theirs].grad for name, theirs in NAMES.items()}


@pytest.mark.parametrize("tensor", [1, 2])
def test_loss_and_gradients_equal_the_reference_on_one_rank_and_on_two(pool: Any, wanted: Any, tensor: int) -> None:
    root, loss, gradients = wanted
    results = pool.run(loss_and_gradients, tensor, root)
    assert all(abs(found - loss) < 1e-5 for found, _ in results)
    rows = torch.cat([found["output_layer.weight"] for _, found in results])[:200]
    torch.testing.assert_close(rows, gradients["output_layer.weight"], rtol=1e-4, atol=1e-6)
    name = "decoder.final_layernorm.weight"
    for _, found in results:
        torch.testing.assert_close(found[name], gradients[name], rtol=1e-4, atol=1e-6)


def test_the_loss_would_be_another_without_it(wanted: Any) -> None:
    assert wanted[1] - baichuan.make("2-13b", z_loss_weight=0).loss(IDS).item() > 0.1


def test_of_equally_large_logits_on_two_ranks_one_gets_the_gradient(pool: Any) -> None:
    first, second = pool.run(tied_largest, 2)
    assert first.tolist() == [0, 1, 0, 5] and second.tolist() == [0, 0, 0, 5]
