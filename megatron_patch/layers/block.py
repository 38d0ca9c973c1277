"""Transformer layers whose residual stream runs otherwise than megatron-core's; each takes the place of a whole layer.

Attention, MLP and norms are those of the layer spec. Core recomputes whole layers and core attention around them as
ever; what it recomputes or offloads inside a layer of its own is not for these.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

NoNorm = IdentityOp


class _Layer(TransformerLayer):
    """What ours share: inputs [S, B, H] in and out, as TransformerBlock calls a layer."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        if refused := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"{type(self).__name__} takes no {refused[0]}")
        return self._flow(hidden_states, {"attention_mask": attention_mask, "rotary_pos_emb": rotary_pos_emb}), None

    def _flow(self, x: Tensor, how: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def _dropped(self, output: tuple[Tensor, Tensor | None]) -> Tensor:
        """A sublayer's output with its bias, after dropout."""
        values, bias = output
        return F.dropout(values if bias is None else values + bias, self.hidden_dropout, self.training)


class ParallelLayer(_Layer):
    """Attention and MLP side by side: ``x + attention(norm(x)) + mlp(norm(x))`` (Wang and Komatsuzaki 2021, GPT-J).

    The MLP has a norm of its own, or shares the attention's where the spec's `pre_mlp_layernorm` is `NoNorm`.
    """

    def _flow(self, x: Tensor, how: dict[str, Any]) -> Tensor:
        normed = self.input_layernorm(x)
        attended = self._dropped(self.self_attention(normed, **how))
        shared = isinstance(self.pre_mlp_layernorm, IdentityOp)
        return x + attended + self._dropped(self.mlp(normed if shared else self.pre_mlp_layernorm(x)))


class NormedResidualLayer(_Layer):
    """The residual is the normed input: ``a n + f(n)`` with ``n = norm(x)`` and ``a = 1``."""

    scale = 1.0

    def _flow(self, x: Tensor, how: dict[str, Any]) -> Tensor:
        normed = self.input_layernorm(x)
        x = self.scale * normed + self._dropped(self.self_attention(normed, **how))
        normed = self.pre_mlp_layernorm(x)
        return self.scale * normed + self._dropped(self.mlp(normed))


class DeepNormLayer(NormedResidualLayer):
    """The same with ``a = sqrt(2 layers)``: DeepNorm (Wang et al. 2022) as GLM has it (Zeng et al. 2022)."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.scale = math.sqrt(2 * config.num_layers)


class SandwichLayer(_Layer):
    """What attention and MLP put out is normed, too, before it joins the residual (Ding et al. 2021, section 2.3)."""

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        sizes = dict(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.post_self_attn_layernorm = build_module(submodules.input_layernorm, **sizes)
        self.post_mlp_layernorm = build_module(submodules.input_layernorm, **sizes)

    def _flow(self, x: Tensor, how: dict[str, Any]) -> Tensor:
        x = x + self.post_self_attn_layernorm(self._dropped(self.self_attention(self.input_layernorm(x), **how)))
        return x + self.post_mlp_layernorm(self._dropped(self.mlp(self.pre_mlp_layernorm(x))))
