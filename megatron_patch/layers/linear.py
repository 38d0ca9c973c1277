"""Tensor-parallel linears with a bias where the model's others have none: ``add_bias_linear`` is all or nothing."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class ColumnParallelLinearWithBias(ColumnParallelLinear):
    """megatron-core's, always with a bias."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": True})


class RowParallelLinearWithBias(RowParallelLinear):
    """megatron-core's, always with a bias."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": True})
