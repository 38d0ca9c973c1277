"""Core attention on torch's scaled_dot_product_attention (its flash kernels on CUDA and CPU), swapped in by layer spec.

`UnfusedAttention` computes the same from its definition; it is the reference in tests and never faster.

Shapes: S queries, L keys, B rows, H query heads on this rank, G key-value groups on this rank, D head size.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_patch.layers.cache import KVCache
from megatron_patch.layers.documents import attend_documents


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
        in_window = config.window_size and is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window: int | None = config.window_size[0] + 1 if in_window else None
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
            attention_mask: [B or 1, 1, S, L], True where a query must not look (megatron-core's sense), or None; or
                [B, S], where each query's document starts (documents.py).

        Returns:
            [S, B, H * D].
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("SDPAttention takes neither attention_bias nor packed sequences")
        if _tells_documents(attention_mask):
            return attend_documents((query_SBHD, key_LBGD, value_LBGD), attention_mask, self._attend_alone)
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query_SBHD, key_LBGD, value_LBGD))
        allowed = None if attention_mask is None else ~attention_mask
        causal = allowed is None and (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        if self.kv_cache is not None:
            query, key = self.kv_cache.rotate(query), self.kv_cache.rotate(key)
            key, value = self.kv_cache.update(self.layer_number, key, value)
            allowed = self.kv_cache.mask(self.window)
            causal = allowed is None and query.shape[2] > 1
        elif self.window is not None and self.window < key.shape[2]:
            near = _band(query.shape[2], self.window, query.device)
            allowed, causal = near if allowed is None else near & allowed, False
        context_BHSD = self._attend(query, key, value, allowed, causal)
        return context_BHSD.permute(2, 0, 1, 3).flatten(2)

    def _attend_alone(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention over rows that hold one document each."""
        if self.window is None or self.window >= key.shape[2]:
            return self._attend(query, key, value, None, True)
        return self._attend(query, key, value, _band(query.shape[2], self.window, query.device), False)

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


def _tells_documents(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 2


@lru_cache(maxsize=2)
def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[S, S], True where a key is at most ``window - 1`` before the query, and not after it."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


class AlibiAttention(SDPAttention):
    """Keys count by a slope per head the more the later they are (Press et al. 2022), without a tensor of biases.

    The bias of key position j is ``slope * j`` for every query, as softmax does not see what is common to a row. So it
    is a product of query and key, and stands in a few channels more: kernels that take no bias take these. Slope and
    position have two channels each, coarse and fine, so that bf16 loses nothing up to position 65,535.
    """

    factor = 1.0
    """What the biases are multiplied with."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, layer_number, *args, **kwargs)
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        first = get_tensor_model_parallel_rank() * heads
        self._slopes = alibi_slopes(config.num_attention_heads)[first : first + heads]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
        slopes = torch.tensor(self._slopes, device=query.device)[:, None] * (self.factor / self.scale)
        coarse = slopes.to(query.dtype).float()
        fine = slopes - coarse
        positions = torch.arange(key.shape[2], device=key.device)
        query = _with_channels(query, torch.cat((256 * coarse, 256 * fine, coarse, fine), -1)[:, None])
        key = _with_channels(
            key, torch.stack((positions // 256, positions // 256, positions % 256, positions % 256), -1)
        )
        context = super()._attend(query, key, F.pad(value, (0, query.shape[-1] - value.shape[-1])), allowed, causal)
        return context[..., : value.shape[-1]]


class ScaledAlibiAttention(AlibiAttention):
    """The biases are scaled like the scores (Falcon)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = self.scale


def _with_channels(states_BHSD: Tensor, extra: Tensor) -> Tensor:
    """More channels for every head, and zeros up to a multiple of 8, which kernels want."""
    batch, heads, length, size = states_BHSD.shape
    extra = extra.to(states_BHSD.dtype).expand(batch, heads, length, extra.shape[-1])
    return F.pad(torch.cat((states_BHSD, extra), -1), (0, -(size + extra.shape[-1]) % 8))


def alibi_slopes(heads: int) -> list[float]:
    """The slope of each head: 2^(-8/n), 2^(-16/n), ... for n heads; where n is no power of two, those of the next lower
    one, and then every second one of the next higher (Press et al. 2022, their published code)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


class LogNAttention(SDPAttention):
    """Outside of training, queries beyond the trained length n are scaled by log_n(position) (Su 2021, Qwen)."""

    trained_length = 0

    def forward(
        self, query_SBHD: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not self.training:
            positions = self._positions_SB(query_SBHD, attention_mask)
            scale = ((positions + 1).float().log() / math.log(self.trained_length)).clamp(min=1.0)
            query_SBHD = query_SBHD * scale[:, :, None, None].to(query_SBHD.dtype)
        return super().forward(query_SBHD, key, value, attention_mask, *args, **kwargs)

    def _positions_SB(self, query_SBHD: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Positions in the text: the row's, or where documents are told apart, each document's."""
        if self.kv_cache is not None:
            return self.kv_cache.positions_SB()
        positions_SB = torch.arange(len(query_SBHD), device=query_SBHD.device)[:, None]
        if _tells_documents(attention_mask):
            return positions_SB - attention_mask.T.to(query_SBHD.device)
        return positions_SB


def tell_trained_length(model: GPTModel, length: int) -> None:
    """Amends a built model whose attention is `LogNAttention`."""
    for module in model.modules():
        if isinstance(module, LogNAttention):
            module.trained_length = length


class DepthScaledAttention(SDPAttention):
    """Scores are divided by the layer's number too, from 1 (Karamcheti et al. 2021, Mistral: stable training)."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, layer_number, *args, **kwargs)
        self.scale /= layer_number


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
