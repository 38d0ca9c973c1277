"""Experts one after the other: megatron-core's, and quick to lay out on the meta device.

A model with hundreds of experts a layer is planned on meta (names, shapes and partition attributes, no values).
Building each of them module by module takes most of that time, although they differ in nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig


class SequentialExperts(SequentialMLP):
    """megatron-core's; on the meta device one expert is built and the others are its twins."""

    def __init__(self, num_local_experts: int, *args: Any, **kwargs: Any) -> None:
        built = 1 if _on_meta() else num_local_experts
        with _as_if_all_were_drawn(built, *args, **kwargs):
            super().__init__(built, *args, **kwargs)
        for parameter in self.parameters():
            # The ranks that hold the same expert sum its gradient, even where EP is 1: with experts that tensor
            # parallelism does not split they are not the data-parallel ones. The optimizer's parts are the same, too.
            parameter.allreduce = False
        if _on_meta():
            self.num_local_experts = num_local_experts
            self.local_experts.extend(_twin(self.local_experts[0]) for _ in range(num_local_experts - 1))


@contextmanager
def _as_if_all_were_drawn(
    num_local_experts: int,
    config: TransformerConfig,
    submodules: MLPSubmodules,
    pg_collection: ProcessGroupCollection,
) -> Iterator[None]:
    """Draws the random weights of other ranks' experts before and after this rank's, and forgets them.

    On the CPU all ranks draw the same numbers, so that a layout does not change the initial model: without this, the
    first expert of every rank would be the same. On CUDA, experts have a random stream of each rank's own.
    """
    draws = config.use_cpu_initialization and config.perform_initialization and not _on_meta()
    before = pg_collection.ep.rank() if draws else 0
    after = pg_collection.ep.size() - before - 1 if draws else 0
    for _ in range(before * num_local_experts):
        SequentialMLP(1, config, submodules, pg_collection)
    yield
    for _ in range(after * num_local_experts):
        SequentialMLP(1, config, submodules, pg_collection)


def _on_meta() -> bool:
    return torch.get_default_device().type == "meta"


def _twin(module: torch.nn.Module) -> torch.nn.Module:
    """A module like this one, with parameters of its own that carry the same attributes."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = module.__dict__ | {
        "_parameters": {name: p if p is None else _twin_of(p) for name, p in module._parameters.items()},
        "_modules": {name: _twin(inner) for name, inner in module._modules.items()},
    }
    return twin


def _twin_of(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    twin = torch.nn.Parameter(parameter.detach(), parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    return twin
