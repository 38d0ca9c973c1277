"""Baichuan 1 and 2, 7B and 13B: a plain reference, written to be obviously right and not to be fast.

Written from the public description: the technical report of Baichuan 2 (arXiv 2309.10305: NormHead, max-z loss), the
ALiBi paper (arXiv 2108.12409: slopes), the config.json files of the checkpoints and the names and shapes of their
tensors. It knows no cache, no padding, no dropout and no quantised weights.

All sizes share `model_type: baichuan`, and nothing in a config names the position encoding or the head. What tells
them apart is which fields there are:

* 7B uses rotary positions and has `max_position_embeddings`; 13B uses ALiBi and has only `model_max_length`.
  (Baichuan2-7B has both fields, so the presence of `model_max_length` alone says nothing.)
* Version 2 has 125,696 tokens, version 1 has 64,000. Some revisions of version 2 have `z_loss_weight` too; it counts
  here as well, because a tiny model has another vocabulary.

The published NormHead overwrites its weight with the normalised rows at the first forward pass in eval mode. Here it
is never overwritten: the logits are the same.

Shape suffixes: B batch, S sequence (T the same, for keys), E hidden, H heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROTARY_BASE = 10000.0
"""Not in the config: the published code has it as a constant."""

VOCAB_SIZE_OF_VERSION_2 = 125696

_COMMON: dict[str, Any] = dict(
    architectures=["BaichuanForCausalLM"],
    auto_map=dict(
        AutoConfig="configuration_baichuan.BaichuanConfig",
        AutoModelForCausalLM="modeling_baichuan.BaichuanForCausalLM",
    ),
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    hidden_size=48,
    initializer_range=0.02,
    intermediate_size=64,
    model_type="baichuan",
    num_attention_heads=8,
    num_hidden_layers=4,
    pad_token_id=0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.29.2",
    use_cache=True,
    vocab_size=200,
)

TINY: dict[str, dict[str, Any]] = {
    "7b": dict(
        _COMMON,
        architectures=["BaiChuanForCausalLM"],
        auto_map=dict(
            AutoConfig="configuration_baichuan.BaiChuanConfig",
            AutoModelForCausalLM="modeling_baichuan.BaiChuanForCausalLM",
        ),
        max_position_embeddings=64,
        torch_dtype="float16",
    ),
    "13b": dict(
        _COMMON,
        _from_model_config=True,
        gradient_checkpointing=False,
        model_max_length=64,
        num_attention_heads=6,
        num_hidden_layers=3,
    ),
    "2-7b": dict(_COMMON, _from_model_config=True, max_position_embeddings=64, model_max_length=64, z_loss_weight=0),
    "2-13b": dict(
        _COMMON,
        _from_model_config=True,
        gradient_checkpointing=False,
        model_max_length=64,
        tokenizer_class="BaichuanTokenizer",
        z_loss_weight=0.01,
    ),
}


def is_rotary(config: dict[str, Any]) -> bool:
    """Whether positions are rotary (7B); ALiBi otherwise (13B)."""
    return "max_position_embeddings" in config


def has_norm_head(config: dict[str, Any]) -> bool:
    """Whether the output layer is a NormHead (version 2)."""
    return "z_loss_weight" in config or config["vocab_size"] == VOCAB_SIZE_OF_VERSION_2


def alibi_slopes(num_heads: int) -> list[float]:
    """One slope a head; where the count is no power of two, every other slope of the next power fills the rest."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    finer = [2.0 ** (-4.0 * (head + 1) / power) for head in range(2 * power)]
    return slopes + finer[0::2][: num_heads - power]


def alibi_bias(num_heads: int, length: int) -> Tensor:
    """What ALiBi adds to the scores: 0 for a token itself, minus slope x distance for those before it. [H, S, T]."""
    position_S = torch.arange(length, dtype=torch.float32)
    distance_ST = position_S[:, None] - position_S[None, :]
    return -torch.tensor(alibi_slopes(num_heads))[:, None, None] * distance_ST


def rotate(x_BHSD: Tensor) -> Tensor:
    """Turn the pair (i, i + D/2) of the vector at position p by the angle p x base^(-2i/D)."""
    length, dim = x_BHSD.shape[-2:]
    frequency_d = ROTARY_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle_Sd = torch.arange(length, dtype=torch.float32)[:, None] * frequency_d
    first, second = x_BHSD.chunk(2, dim=-1)
    cos, sin = angle_Sd.cos(), angle_Sd.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.weight * x_BSE * torch.rsqrt(x_BSE.square().mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.num_heads = config["num_attention_heads"]
        self.rotary = is_rotary(config)
        self.W_pack = nn.Linear(hidden, 3 * hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        length = x_BSE.shape[1]
        q_BSE, k_BSE, v_BSE = self.W_pack(x_BSE).chunk(3, dim=-1)
        q_BHSD, k_BHSD, v_BHSD = map(self._split_heads, (q_BSE, k_BSE, v_BSE))
        if self.rotary:
            q_BHSD, k_BHSD = rotate(q_BHSD), rotate(k_BHSD)
        scores_BHST = q_BHSD @ k_BHSD.transpose(-1, -2) / math.sqrt(q_BHSD.shape[-1])
        if not self.rotary:
            scores_BHST = scores_BHST + alibi_bias(self.num_heads, length)
        later_ST = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights_BHST = scores_BHST.masked_fill(later_ST, float("-inf")).softmax(-1)
        return self.o_proj((weights_BHST @ v_BHSD).transpose(1, 2).flatten(2))

    def _split_heads(self, x_BSE: Tensor) -> Tensor:
        return x_BSE.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BSE)) * self.up_proj(x_BSE))


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, x_BSE: Tensor) -> Tensor:
        x_BSE = x_BSE + self.self_attn(self.input_layernorm(x_BSE))
        return x_BSE + self.mlp(self.post_attention_layernorm(x_BSE))


class Decoder(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSE = self.embed_tokens(ids_BS)
        for layer in self.layers:
            x_BSE = layer(x_BSE)
        return self.norm(x_BSE)


class NormHead(nn.Linear):
    """An output layer whose rows count by their direction only."""

    def forward(self, x_BSE: Tensor) -> Tensor:
        return F.linear(x_BSE, F.normalize(self.weight, dim=-1))


class Reference(nn.Module):
    """Baichuan as its config.json describes it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.z_loss_weight = config.get("z_loss_weight", 0)
        self.model = Decoder(config)
        head = NormHead if has_norm_head(config) else nn.Linear
        self.lm_head = head(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """The logits, [B, S, V]."""
        return self.lm_head(self.model(ids_BS))

    def loss(self, ids_BS: Tensor) -> Tensor:
        """Mean cross-entropy of every next token, plus z_loss_weight x the mean square of the largest logit."""
        logits_BSV = self(ids_BS)[:, :-1]
        cross_entropy = F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten())
        return cross_entropy + self.extra_loss(logits_BSV).mean()

    def extra_loss(self, logits_BSV: Tensor) -> Tensor:
        """What max-z loss adds to the loss of each token, [B, S]."""
        return self.z_loss_weight * logits_BSV.amax(-1).square()


def make(variant: str, seed: int = 0, **changes: Any) -> Reference:
    """A random tiny model in fp32 and eval mode; `changes` replace fields of the variant's config."""
    model = Reference({**TINY[variant], **changes}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.12, generator=generator)
    return model
