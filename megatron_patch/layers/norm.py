"""RMSNorm and LayerNorm on torch, marked for sequence parallelism.

megatron-core's own torch norm refuses sequence parallelism, and its fused ones need CUDA.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _Norm(torch.nn.Module):
    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: object) -> None:
        super().__init__()
        self.eps, self.shape = eps, (hidden_size,)
        self.weight = self._parameter(config, torch.ones(hidden_size, dtype=config.params_dtype))

    @staticmethod
    def _parameter(config: TransformerConfig, values: Tensor) -> torch.nn.Parameter:
        if not config.use_cpu_initialization and torch.cuda.is_available():
            values = values.to(torch.cuda.current_device())
        parameter = torch.nn.Parameter(values)
        # Each tensor-parallel rank sees its part of the sequence only: core sums gradients of parameters so marked.
        parameter.sequence_parallel = config.sequence_parallel
        return parameter


class RMSNorm(_Norm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang and Sennrich 2019, equation 4)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LatentRMSNorm(RMSNorm):
    """Inside latent attention: its epsilon is 1e-6, whatever that of the other norms is (DeepSeek)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, **_unused: object) -> None:
        super().__init__(config, hidden_size, eps=1e-6)


class LayerNorm(_Norm):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__(config, hidden_size, eps, **unused)
        self.bias = self._parameter(config, torch.zeros(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


def without_parameters(model: GPTModel) -> None:
    """Amends a built model: its LayerNorms have neither weights nor biases."""
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.weight = module.bias = None
