"""Tensor-parallel linears: megatron-core's, lean where no gradient is wanted, and with a bias where a family has one.

A step of generation calls each linear with a single token a row: there, core's autograd functions (made to overlap
gradient communication) take a large share of the time. Without gradients these compute and communicate, nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """Splits the output features; see megatron-core's."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if torch.is_grad_enabled() or self.sequence_parallel or self.explicit_expert_comm:
            return super().forward(input_, weight, runtime_gather_output)
        output = F.linear(input_, self.weight if weight is None else weight, None if self.skip_bias_add else self.bias)
        if self.gather_output if runtime_gather_output is None else runtime_gather_output:
            output = tensor_parallel.gather_from_tensor_model_parallel_region(output, group=self.tp_group)
        return output, self.bias if self.skip_bias_add else None


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Splits the input features, and sums over the tensor-parallel ranks; see megatron-core's."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        lean = self.input_is_parallel and not (self.sequence_parallel or self.explicit_expert_comm)
        if torch.is_grad_enabled() or not lean:
            return super().forward(input_)
        output = F.linear(input_, self.weight)
        if self.tp_group.size() > 1:
            dist.all_reduce(output, group=self.tp_group)
        if self.skip_bias_add:
            return output, self.bias
        return output if self.bias is None else output + self.bias, None


class ColumnParallelLinearWithBias(ColumnParallelLinear):
    """Always with a bias, whatever the config's ``add_bias_linear`` says for all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": True})


class RowParallelLinearWithBias(RowParallelLinear):
    """Always with a bias, whatever the config's ``add_bias_linear`` says for all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": True})
