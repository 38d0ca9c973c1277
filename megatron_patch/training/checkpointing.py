"""Save and resume everything of a training run, in megatron-core's `torch_dist` format.

A checkpoint is written beside its place and renamed when it is whole; the tracker moves last. Weights and, with
megatron-core's reshardable optimizer formats, the optimizer's state load under another parallel layout; random states
are per rank and are restored only under the same one. It knows no families, arguments' meaning or data.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_patch.backend.torch_adam import prepare_adam_for_loading, unshare_adam_steps
from megatron_patch.checkpoint.directory import is_legacy, iteration_directory, staging, write_tracker

# One format for every optimizer that survives a change of the tensor, pipeline and data parallel sizes.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0
    consumed_samples: int = 0


@dataclass(frozen=True)
class Layout:
    """What the states that are stored per rank depend on."""

    tensor: int
    pipeline: int
    data: int
    distributed_optimizer: bool
    expert: int = 1
    expert_tensor: int | None = None
    """None where it is as large as `tensor`, as in checkpoints from before it could be chosen."""

    @classmethod
    def current(cls, distributed_optimizer: bool) -> Layout:
        """The layout of the initialised parallel state."""
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        experts = parallel_state.get_expert_tensor_parallel_world_size()
        return cls(
            tensor,
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_data_parallel_world_size(),
            distributed_optimizer,
            parallel_state.get_expert_model_parallel_world_size(),
            None if experts == tensor else experts,
        )


@dataclass(frozen=True)
class Trainer:
    """The objects whose state a checkpoint holds."""

    model: Sequence[torch.nn.Module]
    """This rank's model chunks, unwrapped."""

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    layout: Layout


def save(root: str, trainer: Trainer, progress: Progress, settings: Mapping[str, Any], keep_last: int | None) -> Path:
    """Write a checkpoint (call it on every rank) and forget the oldest ones of this run beyond `keep_last`."""
    final = iteration_directory(root, progress.iteration)
    state = {
        "checkpoint_version": 3.0,
        **asdict(progress),
        "layout": asdict(trainer.layout),
        "settings": dict(settings),
        "opt_param_scheduler": trainer.scheduler.state_dict(),
        **_sharded_state(trainer, is_loading=False),
        "rng_state": _sharded_random_state(),
    }
    with ExitStack() as stack:
        staged = [str(stack.enter_context(staging(final, overwrite=True)))] if dist.get_rank() == 0 else [None]
        dist.broadcast_object_list(staged)
        # Core would keep a process for what its writer reports. Launchers signal a whole group of processes: that one
        # would end, and the checkpoint that the signal asks for could not be written.
        filesystem_async._results_queue = SimpleQueue()
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        dist_checkpointing.save(state, staged[0], strategy, content_metadata=_METADATA)
        dist.barrier()
    if dist.get_rank() == 0:
        write_tracker(root, progress.iteration)
        _forget(Path(root), keep_last)
    dist.barrier()
    return final


def _forget(root: Path, keep_last: int | None) -> None:
    if keep_last:
        for old in sorted(root.glob("iter_*"))[:-keep_last]:
            shutil.rmtree(old)


def load(directory: Path, trainer: Trainer, *, with_optimizer: bool) -> Progress:
    """Restore everything that a checkpoint of a training run holds and this layout can take.

    Raises:
        ValueError: it holds no training state, one of another program, or of an optimizer of another kind.
    """
    common = {} if is_legacy(directory) else dist_checkpointing.load_common_state_dict(str(directory))
    if not {"opt_param_scheduler", "layout"} <= common.keys():
        raise ValueError(
            f"{directory} holds weights only, or a training state of another program; give --finetune to start a new "
            "run from the weights"
        )
    saved = Layout(**common["layout"])
    if with_optimizer and saved.distributed_optimizer != trainer.layout.distributed_optimizer:
        raise ValueError(
            f"{directory} was saved {'with' if saved.distributed_optimizer else 'without'} "
            "--use-distributed-optimizer; resume likewise, or give --no-load-optim"
        )
    same_layout = saved == trainer.layout
    prepare_adam_for_loading(trainer.optimizer)
    state = _sharded_state(trainer, is_loading=True, with_optimizer=with_optimizer)
    if same_layout:
        state["rng_state"] = _sharded_random_state()
    loaded = dist_checkpointing.load(state, str(directory))
    for index, chunk in enumerate(trainer.model):
        chunk.load_state_dict(loaded[f"model{index or ''}"])
    if with_optimizer:
        trainer.optimizer.load_state_dict(loaded["optimizer"])
        unshare_adam_steps(trainer.optimizer)
    else:
        trainer.optimizer.reload_model_params()
    trainer.scheduler.load_state_dict(common["opt_param_scheduler"])
    if same_layout:
        _restore_random_state(loaded["rng_state"])
    return Progress(common["iteration"], common["consumed_samples"])


def _sharded_state(trainer: Trainer, is_loading: bool, with_optimizer: bool = True) -> dict[str, Any]:
    metadata = {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    models = {f"model{i or ''}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(trainer.model)}
    if not with_optimizer:
        return models
    model = {name: tensor for chunk in models.values() for name, tensor in chunk.items()}
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {**models, "optimizer": optimizer}


# -------------------------------------------------------------------------------------------------------- random states


def _sharded_random_state() -> ShardedObject:
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    pipeline, tensor, data = (
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_world_size()),
        (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()),
        (parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()),
    )
    ranks, sizes = zip(pipeline, tensor, data, strict=True)
    return ShardedObject("rng_state", state, sizes, ranks, replica_id=0)


def _restore_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    if state["cuda_rng_state"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
