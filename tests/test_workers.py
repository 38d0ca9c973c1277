"""The pool of gloo workers itself: it computes, reports a failing rank, notices a hang, and works again afterwards."""

from __future__ import annotations

import os
import time

import pytest

from tests.workers import Pool, WorkerError


def sum_of_ranks(rank: int, world_size: int, offset: float) -> float:
    import torch

    value = torch.tensor([rank + offset])
    torch.distributed.all_reduce(value)
    return value.item()


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def tensor_of_rank(rank: int, world_size: int):
    import torch

    return torch.full((3,), float(rank), dtype=torch.bfloat16)


def fail_on_rank_one(rank: int, world_size: int) -> None:
    import torch

    if rank == 1:
        raise RuntimeError("only rank 1 says so")
    torch.distributed.barrier()


def fail_everywhere(rank: int, world_size: int) -> None:
    raise RuntimeError("boom")


def hang_on_rank_zero(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(60)


def die(rank: int, world_size: int) -> None:
    os._exit(3)


def tensor_parallel_rank(rank: int, world_size: int) -> int:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    return parallel_state.get_tensor_model_parallel_rank()


def test_four_ranks_reduce_a_value_together(pool: Pool) -> None:
    assert pool.run(sum_of_ranks, 4, 0.5) == [8.0] * 4


def test_two_calls_run_in_the_same_processes(pool: Pool) -> None:
    assert pool.run(process_id, 2) == pool.run(process_id, 2)


def test_tensors_come_back_with_their_dtype(pool: Pool) -> None:
    first, second = pool.run(tensor_of_rank, 2)
    assert second.dtype == first.dtype and second.tolist() == [1.0] * 3


def test_model_parallel_groups_of_one_call_do_not_leak_into_the_next(pool: Pool) -> None:
    assert pool.run(tensor_parallel_rank, 2) == [0, 1]
    assert pool.run(tensor_parallel_rank, 1) == [0]


@pytest.fixture(scope="module")
def own_pool():
    pool = Pool()
    yield pool
    pool.close()


def test_an_exception_in_one_rank_is_reported_with_its_traceback(own_pool: Pool) -> None:
    with pytest.raises(WorkerError, match="(?s)rank 1: .*fail_on_rank_one.*only rank 1 says so"):
        own_pool.run(fail_on_rank_one, 2)


def test_a_failure_of_every_rank_keeps_the_processes(own_pool: Pool) -> None:
    before = own_pool.run(process_id, 2)
    with pytest.raises(WorkerError, match="(?s)rank 0: .*boom.*rank 1: .*boom"):
        own_pool.run(fail_everywhere, 2)
    assert own_pool.run(process_id, 2) == before


def test_a_hang_is_reported_with_the_limit_and_the_place(own_pool: Pool) -> None:
    with pytest.raises(WorkerError, match="(?s)no answer from rank 0, 1 within 8 s.*rank 0: .*in hang_on_rank_zero"):
        own_pool.run(hang_on_rank_zero, 2, timeout=8)  # the limit includes the start of two processes


def test_a_process_that_dies_is_reported(own_pool: Pool) -> None:
    with pytest.raises(WorkerError, match="died without an answer"):
        own_pool.run(die, 1)


def test_the_pool_works_again_after_a_failure(own_pool: Pool) -> None:
    with pytest.raises(WorkerError):
        own_pool.run(die, 1)
    assert own_pool.run(sum_of_ranks, 2, 0.0) == [1.0, 1.0]
