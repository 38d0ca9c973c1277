"""A mixture of experts trains the same however its experts are spread, and sizes that do not fit are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import hf_moe
from tests.training.runs import VOCAB, arguments, curve, make_workplace, train

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, dict(expert_model_parallel_size=2)),
    "EP2 distributed optimizer": (2, dict(expert_model_parallel_size=2, use_distributed_optimizer=True)),
    "TP2+SP ETP1": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=1)),
    "TP2+SP EP2 ETP1": (
        2,
        dict(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=1,
        ),
    ),
}
ITERS = 8


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("mixtral"), hf_moe("mixtral", vocab_size=VOCAB))


@pytest.fixture(scope="module")
def run(pool: Any, mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def run(world_size: int, save: Path | None = None, **changes: Any) -> Path:
        save = save or tmp_path_factory.mktemp("run")
        options = dict(train_iters=ITERS, lr_decay_iters=ITERS, eval_interval=ITERS) | changes
        pool.run(train, world_size, arguments(mixtral, save, **options))
        return save

    return run


@pytest.fixture(scope="module")
def alone(run: Callable[..., Path]) -> Path:
    return run(1)


def _equal(found: Path, expected: Path) -> None:
    for name in ("loss", "grad_norm", "validation_loss"):
        assert len(curve(found, name)) == len(curve(expected, name)) >= 2
        assert curve(found, name) == pytest.approx(curve(expected, name), rel=1e-5), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_norms_do_not_depend_on_where_the_experts_are(
    layout: str, run: Callable[..., Path], alone: Path
) -> None:
    world_size, changes = LAYOUTS[layout]
    _equal(run(world_size, **changes), alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_with_its_experts_elsewhere(
    layout: str, run: Callable[..., Path], alone: Path, tmp_path: Path
) -> None:
    world_size, changes = LAYOUTS[layout]
    run(world_size, tmp_path, train_iters=ITERS // 2, lr_decay_iters=ITERS, **changes)
    run(1, tmp_path, **{name: changes[name] for name in changes if name == "use_distributed_optimizer"})
    assert curve(tmp_path, "loss") == pytest.approx(curve(alone, "loss"), rel=1e-5)


def test_random_experts_do_not_depend_on_where_they_are(run: Callable[..., Path], mixtral: Path) -> None:
    begin = dict(load=None, hf_config=str(mixtral / "hf"))
    _equal(run(2, **begin, expert_model_parallel_size=2), run(1, **begin))


def test_tensor_parallelism_without_sequence_parallelism_is_refused_by_name(run: Callable[..., Path]) -> None:
    with pytest.raises(Exception, match="a model with experts needs --sequence-parallel as well"):
        run(2, tensor_model_parallel_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(expert_model_parallel_size=0), "--expert-model-parallel-size 0: must be at least 1"),
        (dict(expert_tensor_parallel_size=0), "--expert-tensor-parallel-size 0: must be at least 1"),
        (
            dict(expert_model_parallel_size=2, tensor_model_parallel_size=2),
            "--expert-model-parallel-size 2: with --tensor-model-parallel-size 2 it needs --sequence-parallel",
        ),
    ],
)
def test_sizes_that_make_no_sense_are_refused_by_name(changes: dict[str, Any], message: str, mixtral: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(mixtral, None, **changes).validate()


def test_experts_that_the_processes_cannot_share_are_refused_with_the_choices(mixtral: Path) -> None:
    args = arguments(mixtral, None, expert_model_parallel_size=4)
    assert args.plan(4).data_parallel_size == 4
    message = "--expert-model-parallel-size 4 x --expert-tensor-parallel-size 1 must divide .* = 2; choose .* 1 or 2"
    with pytest.raises(ValueError, match=message):
        args.plan(2)
    with pytest.raises(ValueError, match="= 2; choose .* 1 and a smaller --expert-tensor-parallel-size"):
        replace(args, expert_model_parallel_size=1, expert_tensor_parallel_size=4).plan(2)
