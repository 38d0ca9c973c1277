"""Processes, devices, megatron-core's parallel state and random seeds: the first thing every entry point does.

Under torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) it joins the other processes, over
NCCL with CUDA and gloo without; alone it is a world of one. It knows no models, arguments or files.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel


def device() -> torch.device:
    """Where this process computes: its CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def initialize(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    *,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    seed: int = 1234,
    timeout_minutes: int = 10,
) -> None:
    """Join the processes and lay them out.

    Raises:
        ValueError: the number of processes is no multiple of tensor x pipeline parallel size, or of what experts need.
    """
    # It announces that it is off, which it always is here.
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    if not dist.is_initialized():
        _join(timedelta(minutes=timeout_minutes))
    world, model = dist.get_world_size(), tensor_model_parallel_size * pipeline_model_parallel_size
    if world % model:
        raise ValueError(
            f"tensor_model_parallel_size={tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{pipeline_model_parallel_size} must divide the number of processes, {world}"
        )
    experts = expert_model_parallel_size * (expert_tensor_parallel_size or tensor_model_parallel_size)
    if world // pipeline_model_parallel_size % experts:
        raise ValueError(
            f"expert_model_parallel_size={expert_model_parallel_size} x expert_tensor_parallel_size="
            f"{expert_tensor_parallel_size or tensor_model_parallel_size} must divide the "
            f"{world // pipeline_model_parallel_size} processes of a pipeline stage"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
        create_gloo_process_groups=torch.cuda.is_available(),
        distributed_timeout_minutes=timeout_minutes,
    )
    seed_everything(seed)


def _join(timeout: timedelta) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def seed_everything(seed: int) -> None:
    """Seed as Megatron-LM does: stages differ; tensor-parallel ranks share one stream and have one of their own."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shut_down() -> None:
    """Leave the groups (idempotent)."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def parallel(*args: int | None, **kwargs: int) -> Iterator[None]:
    """`initialize` on the way in, `shut_down` on the way out."""
    initialize(*args, **kwargs)
    try:
        yield
    finally:
        shut_down()
