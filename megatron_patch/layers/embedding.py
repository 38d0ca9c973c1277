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


def without_dropout(model: GPTModel) -> None:
    """No dropout of what the embedding gives, where that of the sublayers is not meant for it (BLOOM, Falcon, OPT)."""
    if hasattr(model, "embedding"):
        model.embedding.embedding_dropout.p = 0.0


def _normed(embedding: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return embedding.norm(output)


def prepare_positions(model: GPTModel, offset: int) -> None:
    """Learned positions in the model's dtype (core leaves them in fp32); position 0 has the row `offset` of them (OPT's
    are made for a padding id of 1)."""
    if hasattr(model, "embedding"):
        model.embedding.position_embeddings.to(model.config.params_dtype)
        if offset:
            model.embedding.position_embeddings.register_forward_pre_hook(partial(_later, offset))


def _later(offset: int, _module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] + offset,)
