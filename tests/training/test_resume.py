"""A run that stops, however it stops, goes on as if it had not."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_patch.checkpoint.directory import latest
from tests.training.runs import arguments, curve, start, train

CURVES = ("loss", "grad_norm", "lr", "validation_loss")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP2": (2, dict(tensor_model_parallel_size=2)),
    "PP2": (2, dict(pipeline_model_parallel_size=2)),
    "DP2 distributed optimizer": (2, dict(use_distributed_optimizer=True)),
    "bf16 DP2 distributed optimizer": (2, dict(use_distributed_optimizer=True, bf16=True)),
    "fp16": (1, dict(fp16=True, initial_loss_scale=1024.0)),
}


def stop_at(rank: int, world_size: int, args: Any, iteration: int, whole_group: bool = False) -> int:
    """For the worker pool: a run that gets SIGTERM during an iteration; with the processes it started, if asked."""
    from megatron_patch.training import loop

    original, calls = loop.train_step, []

    def step(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == iteration and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            for child in multiprocessing.active_children() if whole_group else ():
                child.terminate()
                child.join(10)
        return original(*arguments)

    loop.train_step = step
    try:
        return start(args)
    finally:
        loop.train_step = original


def weights(save: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, optimizer state included."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    reader = FileSystemReader(latest(save)[0])
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_stopped_by_sigterm_resumes_bit_for_bit(
    layout: str, run: Callable[..., Path], pool: Any, workplace: Path, tmp_path: Path
) -> None:
    world_size, changes = LAYOUTS[layout]
    whole = run(world_size, **changes)
    args = arguments(workplace, tmp_path, **changes)
    assert pool.run(stop_at, world_size, args, 10) == [10] * world_size
    assert latest(tmp_path)[1] == 10
    assert pool.run(train, world_size, args) == [20] * world_size
    for name in CURVES:
        assert curve(tmp_path, name) == curve(whole, name), name
    expected = weights(whole)
    assert {name for name, tensor in weights(tmp_path).items() if not torch.equal(tensor, expected[name])} == set()
    assert any("exp_avg" in name for name in expected)


def test_a_signal_to_its_whole_group_lets_a_run_save_though_it_has_saved_before(
    run: Callable[..., Path], pool: Any, workplace: Path, plain: Path, tmp_path: Path
) -> None:
    args = arguments(workplace, tmp_path, save_interval=4)
    assert pool.run(stop_at, 1, args, 10, True) == [10]
    assert latest(tmp_path)[1] == 10
    assert curve(tmp_path, "loss") == curve(plain, "loss")[:10]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, {}), (2, dict(tensor_model_parallel_size=2))),
        ((2, dict(tensor_model_parallel_size=2)), (2, dict(pipeline_model_parallel_size=2))),
        (
            (4, dict(tensor_model_parallel_size=2, use_distributed_optimizer=True)),
            (2, dict(pipeline_model_parallel_size=2, use_distributed_optimizer=True)),
        ),
    ],
    ids=["TP1 to TP2", "TP2 to PP2", "TP2xDP2 to PP2"],
)
def test_another_layout_goes_on_with_the_same_losses(
    before: Any, after: Any, run: Callable[..., Path], pool: Any, workplace: Path, plain: Path, tmp_path: Path
) -> None:
    pool.run(stop_at, before[0], arguments(workplace, tmp_path, **before[1]), 10)
    pool.run(train, after[0], arguments(workplace, tmp_path, **after[1]))
    for name in CURVES:
        assert curve(tmp_path, name) == pytest.approx(curve(plain, name), rel=1e-5), name


def test_only_the_newest_checkpoints_are_kept(run: Callable[..., Path]) -> None:
    save = run(1, save_interval=4, keep_last=2)
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000016", "iter_0000020"]


def test_finetune_takes_the_weights_and_nothing_else(run: Callable[..., Path], plain: Path) -> None:
    save = run(1, load=str(plain), finetune=True, train_iters=2, lr_warmup_iters=None)
    assert curve(save, "consumed_samples") == [4, 8]
    assert curve(save, "validation_loss")[0] == pytest.approx(curve(plain, "validation_loss")[-1], rel=1e-6)


@pytest.mark.parametrize("how", ["finetune", "hf_config"])
def test_a_run_that_began_anew_resumes_when_its_command_is_given_again(
    how: str, run: Callable[..., Path], pool: Any, workplace: Path, plain: Path, tmp_path: Path
) -> None:
    begin = (
        dict(load=str(plain), finetune=True) if how == "finetune" else dict(load=None, hf_config=str(workplace / "hf"))
    )
    whole = run(1, **begin)
    args = arguments(workplace, tmp_path, **begin)
    assert pool.run(stop_at, 1, args, 10) == [10]
    assert pool.run(train, 1, args) == [20]
    assert curve(tmp_path, "loss") == curve(whole, "loss")


def test_another_kind_of_optimizer_is_refused_by_name(run: Callable[..., Path], plain: Path) -> None:
    with pytest.raises(AssertionError, match="--use-distributed-optimizer"):
        run(1, load=str(plain), use_distributed_optimizer=True, train_iters=30)


@pytest.mark.parametrize("form", ["legacy", "torch_dist"])
def test_the_training_state_of_another_program_is_refused_with_what_to_do(
    form: str, plain: Path, tmp_path: Path
) -> None:
    from megatron_patch.training import checkpointing

    other = tmp_path / "iter_0000020"
    if form == "legacy":
        (other / "mp_rank_00").mkdir(parents=True)
    else:
        shutil.copytree(latest(plain)[0], other)
        common = torch.load(other / "common.pt", weights_only=False)
        torch.save({name: value for name, value in common.items() if name != "layout"}, other / "common.pt")
    with pytest.raises(ValueError, match="another program; give --finetune"):
        checkpointing.load(other, None, with_optimizer=True)


def test_without_optimizer_state_the_weights_and_the_schedule_go_on(run: Callable[..., Path], plain: Path) -> None:
    save = run(
        1, load=str(plain), no_load_optim=True, use_distributed_optimizer=True, train_iters=22, lr_decay_iters=20
    )
    assert curve(save, "consumed_samples") == [84, 88]


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_any_moment_leaves_a_good_checkpoint_and_resumes(
    seed: int, workplace: Path, plain: Path, tmp_path: Path
) -> None:
    command = _command(workplace, tmp_path)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        _wait_for(tmp_path / "latest_checkpointed_iteration.txt", process)
        time.sleep(random.Random(seed).uniform(0, 0.4))  # saving after every iteration, it is mostly saving
        os.killpg(process.pid, signal.SIGKILL)  # core's writer processes too
    _, reached = latest(tmp_path)
    assert reached is not None and 1 <= reached < 20
    subprocess.run(command, check=True, capture_output=True)
    assert latest(tmp_path)[1] == 20
    assert curve(tmp_path, "loss") == curve(plain, "loss")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def _command(workplace: Path, save: Path) -> list[str]:
    flags = dict(
        load=workplace / "megatron", save=save, data_path=workplace / "data_text_document", split="90,10,0",
        seq_length=32, global_batch_size=4, train_iters=20, lr=1e-3, min_lr=1e-4, lr_warmup_iters=3, eval_interval=10,
        eval_iters=2, make_vocab_size_divisible_by=4, save_interval=1,
    )  # fmt: skip
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items()]
    return [sys.executable, "-m", "megatron_patch", "pretrain", *(word for pair in pairs for word in pair)]


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
