"""What some families add to megatron-core's embedding: a norm after it, learned positions that start at a later row.

Each function amends a built GPTModel; where this pipeline stage has no embedding it does nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn

from megatron_patch.layers.norm import LayerNorm


def add_norm(model: GPTModel) -> None:
    """A LayerNorm right after the embedding, on the first stage (BLOOM)."""
    if hasattr(model, "embedding"):
        config = model.config
        model.embedding.norm = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)
        model.embedding.register_forward_hook(_normed)


def _normed(embedding: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return embedding.norm(output)


def offset_positions(model: GPTModel, offset: int) -> None:
    """Position 0 has the row `offset` of the learned position embeddings (OPT's are made for a padding id of 1)."""
    if offset and hasattr(model, "embedding"):
        model.embedding.position_embeddings.register_forward_pre_hook(partial(_later, offset))


def _later(offset: int, _module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] + offset,)
