"""Experts one after the other: megatron-core's, and quick to lay out on the meta device.

A model with hundreds of experts a layer is planned on meta (names, shapes and partition attributes, no values).
Building each of them module by module takes most of that time, although they differ in nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP


class SequentialExperts(SequentialMLP):
    """megatron-core's; on the meta device one expert is built and the others are its twins."""

    def __init__(self, num_local_experts: int, *args: Any, **kwargs: Any) -> None:
        on_meta = torch.get_default_device().type == "meta"
        super().__init__(1 if on_meta else num_local_experts, *args, **kwargs)
        if on_meta:
            self.num_local_experts = num_local_experts
            self.local_experts.extend(_twin(self.local_experts[0]) for _ in range(num_local_experts - 1))


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
