"""Legacy checkpoints to test with: saved by megatron-core's own models at any layout, or written by our target."""

from __future__ import annotations

import math
import random
import warnings
import zlib
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_patch.checkpoint.sharding import Layout
from tests.tiny import BASE, MOE, VARIANTS

DIVISIBLE_BY = 16
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: dict(model_type="llama", **{**BASE, **VARIANTS[name]}) for name in ("gqa", "tied", "biases", "mqa")},
    "mixtral": MOE["mixtral"],
    "deepseek": MOE["deepseek"],
    "mtp": {**MOE["deepseek"], "num_nextn_predict_layers": 1},
}


def config(variant: str) -> dict[str, Any]:
    """The config.json of a variant."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**CONFIGS[variant]).to_dict()


def whole(variant: str) -> Any:
    """The model of a variant."""
    from megatron_patch.checkpoint.whole import describe

    return describe(config(variant))


def random_tensors(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every internal tensor, random."""
    generator = torch.Generator().manual_seed(0)
    return {one.name: torch.randn(one.shape, generator=generator).to(dtype) for one in model.claims.values()}


def world_size(layout: Layout) -> int:
    """Processes that a run of this layout has at least."""
    experts = (layout.expert_tensor or layout.tensor) * layout.expert
    return math.lcm(layout.tensor, experts) * layout.pipeline.stages


# ------------------------------------------------------------------------------------------------------- in the workers


def _chunks(values: Mapping[str, Any], layout: Layout, divisible_by: int) -> list[torch.nn.Module]:
    """This rank's model chunks."""
    from megatron.core import parallel_state

    from megatron_patch.model import build_model, transformer_config
    from megatron_patch.models import family_for
    from megatron_patch.training.initialize import seed_everything

    pipeline = layout.pipeline
    sizes: dict[str, Any] = dict(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=pipeline.stages,
        virtual_pipeline_model_parallel_size=pipeline.virtual,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
    seed_everything(1)
    uneven = {
        "num_layers_in_first_pipeline_stage": pipeline.first,
        "num_layers_in_last_pipeline_stage": pipeline.last,
        "pipeline_model_parallel_layout": pipeline.layout,
    }
    sizes |= {name: value for name, value in uneven.items() if value is not None}
    architecture = family_for(values).describe(values)
    settings = transformer_config(architecture, use_cpu_initialization=True, **sizes)
    stages = [None] if pipeline.virtual is None else list(range(pipeline.virtual))
    return [build_model(architecture, settings, vp_stage=i, make_vocab_size_divisible_by=divisible_by) for i in stages]


def save_whole(rank: int, world: int, values: Mapping[str, Any], tensors: Mapping[str, Any], directory: str) -> None:
    """Internal tensors as a torch_dist checkpoint, by megatron-core."""
    from megatron.core import dist_checkpointing

    (model,) = _chunks(values, Layout(), 1)
    model.load_state_dict(tensors)
    dist_checkpointing.save({"model": model.sharded_state_dict()}, directory)


def save_run(rank: int, world: int, values: Mapping[str, Any], weights: str, root: str, layout: Layout) -> None:
    """What a training run would save: one file a rank, with optimizer and random state beside the models."""
    from megatron.core import dist_checkpointing, parallel_state

    chunks = _chunks(values, layout, DIVISIBLE_BY)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about torch's own names, in megatron-core
        loaded = dist_checkpointing.load(sharded, weights)
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"])
        _clear_padding(chunk, values["vocab_size"])
    parts = {f"model{i}" if len(chunks) > 1 else "model": chunk.state_dict() for i, chunk in enumerate(chunks)}
    folder = Path(root) / _folder()
    folder.mkdir(parents=True)
    torch.save({**_training_state(), **parts}, folder / "model_optim_rng.pt")


def _clear_padding(chunk: torch.nn.Module, vocab_size: int) -> None:
    from megatron.core import parallel_state

    for name, parameter in chunk.named_parameters():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            first = parallel_state.get_tensor_model_parallel_rank() * len(parameter)
            parameter.data[max(vocab_size - first, 0) :] = 0


def _folder() -> str:
    """As Megatron-LM's get_checkpoint_name does."""
    from megatron.core import parallel_state as state

    name = f"mp_rank_{state.get_tensor_model_parallel_rank():02d}"
    if state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{state.get_pipeline_model_parallel_rank():03d}"
    if state.get_expert_model_parallel_world_size() > 1:
        name += f"_{state.get_expert_model_parallel_rank():03d}"
    return name


def _training_state() -> dict[str, Any]:
    from megatron.core.transformer.enums import AttnBackend

    moments = {0: {"step": torch.tensor(10.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
    }
    return {
        "args": Namespace(num_layers=4, attention_backend=AttnBackend.auto, params_dtype=torch.float32),
        "checkpoint_version": 3.0,
        "iteration": 10,
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "rng_state": [states],
    }


# ------------------------------------------------------------------------------------------------- in the test process


def write(target: Any, tensors: Mapping[str, torch.Tensor], root: Path) -> Path:
    """Write a target; returns the directory of its release."""
    slots = {}
    for file, payload in target.payload.items():
        planned = target.layout(file)
        (root / file).parent.mkdir(parents=True)
        with open(root / file, "w+b", buffering=0) as stream:
            stream.truncate(planned.size)
            planned.write(stream)
        slots[file] = planned.slots
        assert payload == sum(slot.hole.nbytes for slot in planned.slots.values())
    for name, tensor in tensors.items():
        for part, blocks in zip(target.parts(name), target.split(name, tensor), strict=True):
            _put(root / part.file, slots[part.file].pop(part.slot), blocks, part.nbytes)
    assert not any(slots.values())
    target.finish(root)
    return root / "release"


def _put(file: Path, slot: Any, blocks: Iterable[torch.Tensor], nbytes: int) -> None:
    from megatron_patch.checkpoint.archive import write_crc

    data = b"".join(block.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for block in blocks)
    assert len(data) == nbytes == slot.hole.nbytes
    with open(file, "r+b", buffering=0) as stream:
        stream.seek(slot.start + slot.hole.offset)
        stream.write(data)
        write_crc(stream, slot.hole, slot.start, zlib.crc32(data))
