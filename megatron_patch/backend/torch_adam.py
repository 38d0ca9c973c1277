"""Mends what megatron-core leaves undone where it falls back to torch's AdamW (no Transformer Engine, no NVIDIA apex).

Its distributed optimizer was written for fused optimizers that keep no step per parameter. Loading a checkpoint into
torch's AdamW meets three traps: the step is asked for before it exists, it is looked for among the saved tensors, and
one step tensor ends up shared by all parameters, so that each iteration would count once per parameter. Nothing here
applies to other optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def torch_adams(optimizer: MegatronOptimizer) -> Iterator[tuple[MegatronOptimizer, torch.optim.AdamW]]:
    """Each of core's optimizers that runs on torch's AdamW, with it."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            yield part, part.optimizer


def prepare_adam_for_loading(optimizer: MegatronOptimizer) -> None:
    """Allocate AdamW's state, and let the distributed optimizer fill in what was saved and no more."""
    for part, adam in torch_adams(optimizer):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            moments = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = partial(_fill, part)


def _fill(optimizer: Any, model_param: Tensor, saved: Mapping[str, Tensor]) -> None:
    targets = optimizer._get_main_param_and_optimizer_states(model_param)
    for name, tensor in saved.items():
        targets[name].copy_(tensor)


def unshare_adam_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a step of its own again."""
    for _, adam in torch_adams(optimizer):
        for state in adam.state.values():
            state["step"] = state["step"].clone()
