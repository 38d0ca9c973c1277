"""Training gives the same losses and gradient norms under every layout, and those of a plain transformers loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import arguments, curve

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, dict(tensor_model_parallel_size=2)),
    "TP2+SP": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP2": (2, dict(pipeline_model_parallel_size=2)),
    "DP2": (2, dict()),
    "DP2 distributed optimizer": (2, dict(use_distributed_optimizer=True)),
    "DP2 distributed optimizer, overlap": (2, dict(use_distributed_optimizer=True, overlap_grad_reduce=True)),
    "TP2xPP2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "TP2xDP2+SP": (
        4,
        dict(tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=True),
    ),
    "micro batches of 4": (1, dict(micro_batch_size=4)),
    "full recompute": (1, dict(recompute_granularity="full")),
    "selective recompute": (1, dict(recompute_granularity="selective")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_norms_do_not_depend_on_the_layout(layout: str, run: Callable[..., Path], plain: Path) -> None:
    world_size, changes = LAYOUTS[layout]
    save = run(world_size, **changes)
    for name in ("loss", "grad_norm", "validation_loss"):
        found, expected = curve(save, name), curve(plain, name)
        assert len(found) == len(expected) >= 3
        assert found == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("layout", ["DP2", "micro batches of 4", "PP2"])
def test_a_token_weighs_the_same_wherever_it_lies_when_some_are_masked(
    layout: str, run: Callable[..., Path], plain: Path
) -> None:
    world_size, changes = LAYOUTS[layout]
    expected, found = run(1, eod_mask_loss=True), run(world_size, eod_mask_loss=True, **changes)
    for name in ("loss", "grad_norm"):
        assert curve(found, name) == pytest.approx(curve(expected, name), rel=1e-5), name
        assert curve(expected, name) != pytest.approx(curve(plain, name), rel=1e-5), name


def test_training_learns(plain: Path) -> None:
    losses = curve(plain, "validation_loss")
    assert losses[-1] < losses[0] - 0.3


def test_losses_and_norms_equal_a_plain_transformers_loop(workplace: Path, plain: Path) -> None:
    losses, norms = _reference_loop(workplace)
    assert curve(plain, "loss") == pytest.approx(losses, rel=1e-5)
    assert curve(plain, "grad_norm") == pytest.approx(norms, rel=1e-4)


def _reference_loop(workplace: Path) -> tuple[list[float], list[float]]:
    """AdamW, clipping, warm-up and cosine as the literature defines them, on transformers' model."""
    import math

    from transformers import AutoModelForCausalLM

    from megatron_patch.data.datasets import batches, build_datasets
    from megatron_patch.tokenizer import load_tokenizer

    args = arguments(workplace, None)
    data, _, _ = build_datasets(args.data, load_tokenizer(workplace / "hf"), (80, 0, 0))
    stream = batches(data, 0, 4, 300)
    model = AutoModelForCausalLM.from_pretrained(workplace / "hf")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [dict(params=decayed), dict(params=rest, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    losses, norms = [], []
    for step in range(20):
        warm = step / 3
        lr = 1e-3 * warm if step <= 3 else 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * (step - 3) / 17))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = next(stream)
        logits = model(batch["tokens"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close_to_fp32(precision: str, run: Callable[..., Path], plain: Path) -> None:
    changes: dict[str, Any] = {precision: True, "initial_loss_scale": 1024.0}
    save = run(2, tensor_model_parallel_size=2, **changes)
    assert curve(save, "loss") == pytest.approx(curve(plain, "loss"), rel=5e-3)


def test_fp16_skips_iterations_that_overflow_and_halves_the_scale(run: Callable[..., Path]) -> None:
    save = run(1, fp16=True, initial_loss_scale=2.0**30, hysteresis=1, train_iters=12)
    assert curve(save, "skipped_iterations")[0] == 1
    scales = curve(save, "loss_scale")
    assert scales[0] == 2.0**29 and scales[-1] < 2.0**20
    assert curve(save, "lr")[1] == 0.0  # the schedule waits too


def test_the_metrics_the_curve_and_tensorboard_are_there(plain: Path) -> None:
    assert (plain / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((plain / "tensorboard").glob("events.out.tfevents.*"))
    assert all(value > 0 for value in curve(plain, "tokens_per_second"))


def test_linear_and_constant_schedules_follow_their_formula(run: Callable[..., Path]) -> None:
    linear = curve(run(1, lr_decay_style="linear", train_iters=8, lr_warmup_iters=2), "lr")
    assert linear == pytest.approx([0, 5e-4, 1e-3, *(1e-3 - 9e-4 * i / 6 for i in range(1, 6))])
    constant = curve(run(1, lr_decay_style="constant", train_iters=5, lr_warmup_iters=None), "lr")
    assert constant == pytest.approx([1e-3] * 5)


def test_warm_up_and_length_can_be_given_in_tokens(run: Callable[..., Path]) -> None:
    tokens = 4 * 32
    save = run(1, train_iters=None, train_tokens=6 * tokens + 5, lr_warmup_iters=None, lr_warmup_tokens=2 * tokens)
    assert len(curve(save, "lr")) == 6
    assert curve(save, "lr")[:3] == pytest.approx([0, 5e-4, 1e-3])
