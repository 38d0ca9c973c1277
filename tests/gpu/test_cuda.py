"""What only a CUDA device can prove: NCCL, the flash kernel, half precision, generation, resuming (docs/gpu.md).

    ./run_tests.sh -m gpu

Everything is skipped without a CUDA device, and what needs two where there is one. Training runs as users start it, in
processes of its own; the same code without a device (CUDA_VISIBLE_DEVICES="") is the reference, which the other tests
hold against transformers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import hf_llama, tokens
from tests.training.runs import arguments, curve, make_workplace

pytestmark = pytest.mark.gpu

CURVES = ("loss", "grad_norm", "validation_loss")
ITERATIONS = 5


@pytest.fixture
def world() -> Iterator[None]:
    """One process on one device, over NCCL."""
    from megatron_patch.training.initialize import parallel

    with parallel():
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face directory (grouped queries, a head size that flash kernels take) and its Megatron checkpoint."""
    from megatron_patch.checkpoint.convert import convert

    root = tmp_path_factory.mktemp("checkpoints")
    hf_llama(head_dim=16).save_pretrained(root / "hf")
    convert(root / "hf", root / "megatron")
    return root / "hf", root / "megatron"


# ------------------------------------------------------------------------------------------------------ forward passes


def test_logits_equal_transformers(world: None, checkpoints: tuple[Path, Path]) -> None:
    from megatron_patch.checkpoint.verify import Bounds, verify

    report = verify(*checkpoints, ids=tokens(2, 60).tolist(), bounds=Bounds(1e-4, 1e-5, 1.0))
    assert report.ok, report.problems


def test_the_flash_kernel_takes_grouped_queries_in_bf16(world: None, checkpoints: tuple[Path, Path]) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from megatron_patch.checkpoint.logits import load_model, logits
    from megatron_patch.training.initialize import device

    ids = tokens(1, 60).to(device())
    expected = logits(load_model(checkpoints[1], torch.float32), ids)[:, :200]  # behind them is padding
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where that kernel cannot serve
        found = logits(load_model(checkpoints[1], torch.bfloat16), ids)[:, :200].float()
    assert (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("batch_size", [None, 2])
def test_greedy_generation_equals_transformers(
    world: None, checkpoints: tuple[Path, Path], batch_size: int | None
) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_patch.checkpoint.logits import load_model
    from megatron_patch.generation import generate
    from megatron_patch.training.initialize import device

    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 11, 7, 1, 5)]
    (model,) = load_model(checkpoints[1], torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(checkpoints[0], dtype=torch.float32).to(device())
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = [torch.tensor([prompt], device=device()) for prompt in prompts]
    expected = [reference.generate(one, attention_mask=torch.ones_like(one), **options)[0].tolist() for one in ids]
    limits = [20, 4, 9, 20, 13]  # rows end at different times, and others take their places
    found = generate(model, prompts, max_new_tokens=limits, batch_size=batch_size)
    wanted = [ids[: len(prompt) + limit] for ids, prompt, limit in zip(expected, prompts, limits, strict=True)]
    assert [prompt + new for prompt, new in zip(prompts, found, strict=True)] == wanted


def test_scores_of_texts_equal_transformers(world: None, checkpoints: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_patch.checkpoint.logits import load_model
    from megatron_patch.evaluation.scoring import score
    from megatron_patch.evaluation.windows import Row
    from megatron_patch.training.initialize import device

    (model,) = load_model(checkpoints[1], torch.float32, parallel_output=True)
    reference = AutoModelForCausalLM.from_pretrained(checkpoints[0], dtype=torch.float32).to(device())
    texts = [tokens(1, length, seed=length)[0] for length in (9, 30, 17)]
    found = score(model, [Row(ids.numpy(), len(ids) - 1) for ids in texts], micro_batch_size=2)
    for ids, value in zip(texts, found.negative_log_likelihood, strict=True):
        loss = reference(ids[None].to(device()), labels=ids[None].to(device())).loss
        assert value / (len(ids) - 1) == pytest.approx(loss.item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def plain(workplace: Path) -> Path:
    """fp32 on one device."""
    return train(workplace, workplace / "plain")


def train(workplace: Path, save: Path, processes: int = 1, on_cpu: bool = False, **changes: Any) -> Path:
    """`megatron-patch pretrain` in processes of its own; returns `save`."""
    args = arguments(workplace, save, train_iters=ITERATIONS, **changes)
    command = [sys.executable, "-m", "megatron_patch", "pretrain", "--nproc-per-node", str(processes), *flags(args)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if on_cpu else None
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    return save


def flags(args: Any) -> Iterator[str]:
    """The command line of an argument record."""
    for field in fields(args):
        value = getattr(args, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            yield from ("--" + field.name.replace("_", "-"), *map(str, values))


def assert_same_curves(found: Path, expected: Path, rel: float) -> None:
    for name in CURVES:
        assert len(curve(found, name)) >= 2
        assert curve(found, name) == pytest.approx(curve(expected, name), rel=rel), name


def test_training_equals_training_on_cpu(workplace: Path, plain: Path, tmp_path: Path) -> None:
    assert_same_curves(plain, train(workplace, tmp_path, on_cpu=True), rel=1e-4)


HALF = {
    "bf16": dict(bf16=True),
    "fp16": dict(fp16=True, initial_loss_scale=1024.0),
    "bf16, distributed optimizer": dict(bf16=True, use_distributed_optimizer=True),
    "bf16, distributed optimizer, overlap": dict(bf16=True, use_distributed_optimizer=True, overlap_grad_reduce=True),
    "bf16, full recompute": dict(bf16=True, recompute_granularity="full"),
}


@pytest.mark.parametrize("name", HALF)
def test_half_precision_follows_fp32(name: str, workplace: Path, plain: Path, tmp_path: Path) -> None:
    assert_same_curves(train(workplace, tmp_path, **HALF[name]), plain, rel=0.05)


def test_a_resumed_run_draws_the_dropout_of_an_uninterrupted_one(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path)
    for file in workplace.rglob("config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "attention_dropout": 0.3}))
    whole = train(workplace, tmp_path / "whole", bf16=True, save_interval=2)
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    for iteration in (4, 5):
        shutil.rmtree(resumed / f"iter_{iteration:07d}")
    (resumed / "latest_checkpointed_iteration.txt").write_text("2")
    train(workplace, resumed, bf16=True, save_interval=2)
    # Not bit for bit: CUDA adds up the gradient of the embedding in any order.
    assert_same_curves(resumed, whole, rel=1e-3)


TWO_DEVICES = {
    "TP2+SP": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP2": dict(pipeline_model_parallel_size=2),
    "DP2 distributed optimizer, overlap": dict(use_distributed_optimizer=True, overlap_grad_reduce=True),
}


@pytest.mark.parametrize("name", TWO_DEVICES)
def test_two_devices_train_like_one(name: str, workplace: Path, plain: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert_same_curves(train(workplace, tmp_path, processes=2, **TWO_DEVICES[name]), plain, rel=1e-4)
