"""Logits, loss and every weight's gradient of each Llama variant equal transformers', under every parallel layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.layouts import LAYOUTS, Layout, load_tiny
from tests.tiny import VARIANTS, hf_llama, tokens

IDS = tokens()
LABELS = tokens(seed=2)
MASK = (tokens(vocab_size=4, seed=3) > 0).float()


# ------------------------------------------------------------------------------------------------------- in the workers


def _run(model: torch.nn.Module, forward: Callable[..., Any], count: int, **options: Any) -> list[Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    data = [iter(range(count))] if options.pop("as_list", False) else iter(range(count))
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=data,
        model=[model],
        num_microbatches=count,
        seq_length=IDS.shape[1],
        micro_batch_size=options.pop("micro_batch_size", IDS.shape[0]),
        **options,
    )


def logits(rank: int, world_size: int, roots: dict[str, str], layout: Layout) -> dict[str, torch.Tensor]:
    """Whole logits of every variant, on the ranks of the last stage."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    results = {}
    for name, root in roots.items():
        model = load_tiny(root, layout).eval()

        def forward(data: Any, model: torch.nn.Module) -> Any:
            next(data)
            return model(IDS, _positions(IDS), None), lambda output, non_loss_data: output

        with torch.no_grad():
            outputs = _run(model, forward, 1, forward_only=True, collect_non_loss_data=True)
            if outputs:
                results[name] = gather_from_tensor_model_parallel_region(outputs[0])[..., :200]
    return results


def gradients(rank: int, world_size: int, root: str, expected: str, layout: Layout) -> tuple[float, dict[str, float]]:
    """The loss (0 before the last stage), and each weight's relative gradient error on this rank."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_patch.training.loss import masked_loss

    wanted = dict(load_tiny(expected, layout).named_parameters())
    model = load_tiny(root, layout, calculate_per_token_loss=True, finalize_model_grads_func=finalize_model_grads)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    ddp.zero_grad_buffer()

    def forward(data: Any, model: torch.nn.Module) -> Any:
        row = slice(index := next(data), index + 1)
        output = model(IDS[row], _positions(IDS[row]), None, labels=LABELS[row])
        return output, lambda losses: masked_loss(MASK[row], losses)

    sums = _run(ddp, forward, len(IDS), micro_batch_size=1, forward_only=False)
    loss = sum(s[0] for s in sums) / sum(s[1] for s in sums) if sums else 0.0
    return float(loss), {name: _error(p.main_grad, wanted[name], name) for name, p in model.named_parameters()}


def _error(found: torch.Tensor, wanted: torch.Tensor, name: str) -> float:
    if name.startswith(("embedding.", "output_layer.")):
        from megatron.core import parallel_state

        first = parallel_state.get_tensor_model_parallel_rank() * len(found)
        found, wanted = found[: max(200 - first, 0)], wanted[: max(200 - first, 0)]
    return float((found - wanted).abs().max() / wanted.abs().max()) if wanted.numel() else 0.0


def _positions(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1])[None].expand_as(ids)


# ----------------------------------------------------------------------------------------------------------- references


@cache
def reference(variant: str) -> torch.nn.Module:
    return hf_llama(**VARIANTS[variant])


def convert_model(model: torch.nn.Module, place: Path) -> str:
    from megatron_patch.checkpoint.convert import convert

    model.save_pretrained(place / "hf")
    convert(str(place / "hf"), str(place / "megatron"))
    return str(place / "megatron")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: convert_model(reference(name), tmp_path_factory.mktemp(name)) for name in VARIANTS}


@pytest.fixture(scope="module")
def logits_under(pool: Any, roots: dict[str, str]) -> Callable[[str], dict[str, torch.Tensor]]:
    """Every variant's logits under a layout; each layout runs once."""
    return cache(lambda name: pool.run(logits, LAYOUTS[name].world_size, roots, LAYOUTS[name])[-1])


@cache
def reference_gradients(variant: str) -> tuple[float, torch.nn.Module]:
    """transformers' masked loss, and a model that holds its gradients in place of weights."""
    model = hf_llama(**VARIANTS[variant])
    losses = torch.nn.functional.cross_entropy(model(IDS).logits.flatten(0, 1), LABELS.flatten(), reduction="none")
    loss = (losses * MASK.flatten()).sum() / MASK.sum()
    loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    return loss.item(), model


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, layout: str, logits_under: Callable[[str], Any]) -> None:
    with torch.no_grad():
        expected = reference(variant)(IDS).logits
    assert (logits_under(layout)[variant] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["gqa", "tied", "biases", "mqa", "llama3"])
def test_loss_and_gradients_equal_transformers(
    variant: str, layout: str, pool: Any, roots: Any, tmp_path: Path
) -> None:
    loss, holder = reference_gradients(variant)
    expected = convert_model(holder, tmp_path)
    results = pool.run(gradients, LAYOUTS[layout].world_size, roots[variant], expected, LAYOUTS[layout])
    assert abs(results[-1][0] - loss) / loss <= 1e-5
    errors = {f"rank {rank} {name}": error for rank, (_, found) in enumerate(results) for name, error in found.items()}
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}
