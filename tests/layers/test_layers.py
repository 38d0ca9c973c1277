"""Each layer of ours equals a reference that we did not write, or its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.family import Rope
from megatron_patch.layers.attention import SDPAttention, UnfusedAttention
from megatron_patch.layers.cache import KVCache
from megatron_patch.layers.norm import LayerNorm, RMSNorm
from megatron_patch.layers.rotary import Rotary, attention_factor, inverse_frequencies

ROPES = {
    "default": {},
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=4.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16),
    "yarn, all parameters": dict(
        factor=8.0, original_max_position_embeddings=32, beta_fast=16.0, beta_slow=2.0, mscale=0.8, mscale_all_dim=0.5
    ),
    "yarn, no truncation": dict(factor=4.0, original_max_position_embeddings=16, truncate=False, attention_factor=1.2),
}


@pytest.mark.parametrize("length", [0, 30, 200])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_frequencies_equal_transformers(name: str, length: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = name.split(",")[0]
    parameters = dict(rope_type=kind, rope_theta=5000.0, **ROPES[name])
    config = LlamaConfig(head_dim=24, max_position_embeddings=64, rope_parameters=parameters)
    functions = {"default": LlamaRotaryEmbedding.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}
    expected, factor = functions[kind](config, device="cpu", seq_len=length or None)
    rope = Rope(kind, 5000.0, 64, ROPES[name])
    torch.testing.assert_close(inverse_frequencies(rope, 24, length), expected, rtol=1e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(factor)


@pytest.mark.parametrize("dim", [8, 4])
def test_the_cache_rotates_each_row_by_its_own_positions(dim: int) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    rotary = Rotary(Rope(), dim)
    query_SBHD = _qkv(7, 2)[0]
    angles = rotary(7)
    cache = KVCache(torch.tensor([0, 3]))
    with cache.attached(rotary):
        with cache.step(7):
            assert rotary(7) is None
            rotated = cache.rotate(query_SBHD.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)
        with cache.step(1):
            rotary(1)
            later = cache.rotate(query_SBHD[:1].permute(1, 2, 0, 3)).permute(2, 0, 1, 3)
    assert rotary.kv_cache is None
    for row, pad in enumerate([0, 3]):
        alone = query_SBHD[pad:, row : row + 1]
        expected = _apply_rotary_pos_emb_bshd(alone, angles[: 7 - pad])
        torch.testing.assert_close(rotated[pad:, row : row + 1], expected)
        expected = _apply_rotary_pos_emb_bshd(query_SBHD[:1, row : row + 1], rotary(8)[7 - pad : 8 - pad])
        torch.testing.assert_close(later[:, row : row + 1], expected)


def _config(**changes: Any) -> TransformerConfig:
    base = dict(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8)
    return TransformerConfig(**{**base, "attention_dropout": 0.0, "use_cpu_initialization": True, **changes})


def _attention(cls: type, **changes: Any) -> Any:
    return cls(_config(**changes), layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")


def _qkv(length: int = 12, batch: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, batch, heads, 8, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fused_attention_equals_its_definition(groups: int) -> None:
    query, key, value = _qkv()
    key, value = (t[:, :, :1].expand(-1, -1, groups, -1) * torch.arange(1.0, groups + 1)[:, None] for t in (key, value))
    fused, unfused = (_attention(cls, num_query_groups=groups) for cls in (SDPAttention, UnfusedAttention))
    torch.testing.assert_close(fused(query, key, value, None), unfused(query, key, value, None))


def test_attention_is_causal() -> None:
    query, key, value = _qkv()
    before = _attention(SDPAttention)(query, key, value, None)
    key[8:] += 5
    value[8:] -= 5
    after = _attention(SDPAttention)(query, key, value, None)
    torch.testing.assert_close(before[:8], after[:8])
    assert not torch.allclose(before[8:], after[8:])


def test_a_mask_in_cores_sense_hides_what_is_true() -> None:
    query, key, value = _qkv()
    mask = torch.zeros(3, 1, 12, 12, dtype=torch.bool)
    mask[:, :, :, 4] = True
    before = _attention(SDPAttention)(query, key, value, mask)
    value[4] += 100
    torch.testing.assert_close(before, _attention(SDPAttention)(query, key, value, mask))


@pytest.mark.parametrize("padding", [[0, 0, 0], [0, 2, 5]])
def test_attention_with_a_cache_equals_attention_without(padding: list[int]) -> None:
    attention, (query, key, value) = _attention(SDPAttention), _qkv()
    cache, outputs = KVCache(torch.tensor(padding)), []
    for begin, end in [(0, 7), (7, 8), (8, 11), (11, 12)]:
        with cache.attached(attention), cache.step(end - begin):
            outputs.append(attention(*(t[begin:end] for t in (query, key, value)), None))
    whole = torch.cat(outputs)
    assert whole.isfinite().all()
    for row, pad in enumerate(padding):
        alone = attention(*(t[pad:, row : row + 1] for t in (query, key, value)), None)
        torch.testing.assert_close(whole[pad:, row : row + 1], alone)


@pytest.mark.parametrize("num_new", [2, 9])
def test_a_text_put_in_a_cache_attends_to_itself_alone(num_new: int) -> None:
    attention, (query, key, value) = _attention(SDPAttention), _qkv()
    newcomer = [t * 2 for t in _qkv(num_new + 3, 1, seed=1)]
    cache, other = KVCache(torch.tensor([0, 2, 1])), KVCache(torch.tensor([0]))
    for used, tensors in ((cache, [t[:5] for t in (query, key, value)]), (other, [t[:num_new] for t in newcomer])):
        with used.attached(attention), used.step(len(tensors[0])):
            attention(*tensors, None)
    cache.release(torch.tensor([1]))
    cache.put(torch.tensor([1]), other, torch.tensor([0]))
    both = [t[5:8].clone() for t in (query, key, value)]
    for mixed, one in zip(both, newcomer, strict=True):
        mixed[:, 1:2] = one[num_new:]
    outputs = []
    for step in range(3):
        with cache.attached(attention), cache.step(1):
            outputs.append(attention(*(t[step : step + 1] for t in both), None))
            assert cache.positions_SB().tolist() == [[5 + step, num_new + step, 4 + step]]
    whole = torch.cat(outputs)
    torch.testing.assert_close(whole[:, 1:2], attention(*newcomer, None)[num_new:])
    for row, pad in ((0, 0), (2, 1)):
        alone = attention(*(t[pad:8, row : row + 1] for t in (query, key, value)), None)
        torch.testing.assert_close(whole[:, row : row + 1], alone[-3:])


@pytest.mark.parametrize("way", ["reorder", "release"])
def test_slots_of_a_text_that_is_gone_are_given_up_and_its_row_counts_anew(way: str) -> None:
    attention, (query, key, value) = _attention(SDPAttention), _qkv(300, 2)
    cache = KVCache(torch.tensor([0, 290]))
    with cache.attached(attention), cache.step(295):
        attention(*(t[:295] for t in (query, key, value)), None)
    getattr(cache, way)(torch.tensor([1 if way == "reorder" else 0]))
    rows = slice(1, 2) if way == "reorder" else slice(2)
    for step in range(295, 300):
        with cache.attached(attention), cache.step(1):
            assert cache.positions_SB().tolist() == [[*[step - 295] * (way == "release"), step - 290]]
            last = attention(*(t[step : step + 1, rows] for t in (query, key, value)), None)
    alone = attention(*(t[290:, 1:] for t in (query, key, value)), None)
    torch.testing.assert_close(last[:, -1:], alone[-1:])
    for _ in range(100):
        with cache.attached(attention), cache.step(1):
            attention(*(t[:1, rows] for t in (query, key, value)), None)
    assert cache.num_slots < 295


def test_attention_dropout_drops_in_training_only() -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", 1)
    attention = _attention(SDPAttention, attention_dropout=0.5)
    tensors = _qkv()
    expected = _attention(SDPAttention)(*tensors, None)
    assert not torch.allclose(attention(*tensors, None), expected)
    torch.testing.assert_close(attention.eval()(*tensors, None), expected)
    tracker.reset()


def test_rms_norm_equals_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, theirs = RMSNorm(_config(), 32, eps=1e-3), LlamaRMSNorm(32, eps=1e-3)
    weight, x = torch.randn(32), torch.randn(5, 2, 32) * 0.05
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
    torch.testing.assert_close(ours(x), theirs(x))


def test_layer_norm_equals_torch() -> None:
    ours, theirs = LayerNorm(_config(normalization="LayerNorm"), 32, eps=1e-3), torch.nn.LayerNorm(32, eps=1e-3)
    for norm in (ours, theirs):
        norm.weight.data.copy_(torch.linspace(-1, 2, 32))
        norm.bias.data.copy_(torch.linspace(3, -1, 32))
    x = torch.randn(5, 2, 32)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("marked", [True, False])
def test_norms_carry_the_sequence_parallel_mark(marked: bool) -> None:
    config = _config(tensor_model_parallel_size=2, sequence_parallel=marked)
    norm = LayerNorm(config, 32)
    assert norm.weight.sequence_parallel is norm.bias.sequence_parallel is marked
