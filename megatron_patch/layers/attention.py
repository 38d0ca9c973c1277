"""Core attention on torch's scaled_dot_product_attention (its flash kernels on CUDA and CPU), swapped in by layer spec.

`UnfusedAttention` computes the same from its definition; it is the reference in tests and never faster.

Shapes: S queries, L keys, B rows, H query heads on this rank, G key-value groups on this rank, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_patch.layers.cache import KVCache


class SDPAttention(MegatronModule):
    """Softmax attention, causal unless told otherwise; grouped-query and multi-query included."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError(f"context_parallel_size={config.context_parallel_size} is not supported; choose 1")
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.kv_cache: KVCache | None = None

    def forward(
        self,
        query_SBHD: Tensor,
        key_LBGD: Tensor,
        value_LBGD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            attention_mask: [B or 1, 1, S, L], True where a query must not look (megatron-core's sense), or None.

        Returns:
            [S, B, H * D].
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("SDPAttention takes neither attention_bias nor packed sequences")
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query_SBHD, key_LBGD, value_LBGD))
        allowed = None if attention_mask is None else ~attention_mask
        causal = allowed is None and (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        if self.kv_cache is not None:
            query, key = self.kv_cache.rotate(query), self.kv_cache.rotate(key)
            key, value, allowed = self.kv_cache.update(self.layer_number, key, value)
            causal = allowed is None and query.shape[2] > 1
        context_BHSD = self._attend(query, key, value, allowed, causal)
        return context_BHSD.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        dropout = self.dropout if self.training else 0.0
        if not dropout:
            return F.scaled_dot_product_attention(
                query, key, value, allowed, is_causal=causal, scale=self.scale, enable_gqa=grouped
            )
        with get_cuda_rng_tracker().fork():  # heads differ between tensor-parallel ranks, so must their dropout
            return F.scaled_dot_product_attention(
                query, key, value, allowed, dropout_p=dropout, is_causal=causal, scale=self.scale, enable_gqa=grouped
            )


class UnfusedAttention(SDPAttention):
    """The definition, written out: softmax(scale * Q K^T + mask) V (Vaswani et al. 2017, equation 1)."""

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        scores = query @ key.transpose(2, 3) * self.scale
        if causal:
            allowed = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        return scores.softmax(-1) @ value
