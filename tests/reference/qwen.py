"""Qwen 1.0 (QWenLMHeadModel): a plain reference, written to be obviously right and not to be fast.

Written from the public description: the technical report (arXiv 2309.16609: NTK-aware interpolation, log-n scaling),
the config.json files of the checkpoints and the names and shapes of their tensors. It knows no cache, no padding, no
dropout, no quantised weights or cache, and refuses a partial rotary and a head size other than hidden / heads, which
no published checkpoint has. The first revisions of the configs named the fields otherwise (`n_embd`, `n_layer`,
`n_head`, `ffn_hidden_size`, `n_positions`, `padded_vocab_size`); those are unknown here.

Easy to get wrong:

* `intermediate_size` is twice the real width. `w2` is the gate and `w1` the other factor.
* `seq_length` is the length of training; beyond it, and only in eval mode, the two methods below set in. Neither
  changes anything for a text of at most `seq_length` tokens.
* Dynamic NTK turns all positions of a text slower, in steps: alpha is 1, 3, 7, 15 ... up to 1, 2, 4, 8 ... times
  `seq_length`. So a longer text changes the logits of earlier tokens, too. The published generation works alpha out
  from the prompt and keeps it while tokens are added: that is `prompt_length` here.
* Log-n scaling multiplies the query at position p (counted from 1) by log(p) / log(seq_length), if p > seq_length.

Shape suffixes: B batch, S sequence (T the same, for keys), E hidden, H heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LONG: dict[str, Any] = dict(
    architectures=["QWenLMHeadModel"],
    auto_map=dict(
        AutoConfig="configuration_qwen.QWenConfig",
        AutoModelForCausalLM="modeling_qwen.QWenLMHeadModel",
    ),
    attn_dropout_prob=0.0,
    bf16=False,
    emb_dropout_prob=0.0,
    fp16=False,
    fp32=False,
    hidden_size=48,
    intermediate_size=128,
    initializer_range=0.02,
    kv_channels=6,
    layer_norm_epsilon=1e-6,
    max_position_embeddings=64,
    model_type="qwen",
    no_bias=True,
    num_attention_heads=8,
    num_hidden_layers=4,
    onnx_safe=None,
    rotary_emb_base=10000,
    rotary_pct=1.0,
    scale_attn_weights=True,
    seq_length=16,
    tie_word_embeddings=False,
    tokenizer_class="QWenTokenizer",
    transformers_version="4.32.0",
    use_cache=True,
    use_dynamic_ntk=True,
    use_flash_attn="auto",
    use_logn_attn=True,
    vocab_size=200,
)

TINY: dict[str, dict[str, Any]] = {
    "long": _LONG,
    "ntk": dict(_LONG, use_logn_attn=False, num_attention_heads=6, kv_channels=8),
    "logn": dict(_LONG, use_dynamic_ntk=False, num_hidden_layers=3),
    "short": dict(_LONG, seq_length=8),
    # Like the largest of the family: trained on long texts with a larger rotary base, so that it needs neither.
    "plain": dict(_LONG, use_dynamic_ntk=False, use_logn_attn=False, seq_length=64, rotary_emb_base=1000000),
}


def ntk_alpha(length: int, trained_length: int) -> float:
    """By how much dynamic NTK stretches the rotary base for a text of `length` tokens; 1 leaves it as it is."""
    return max(2 ** math.ceil(math.log(length / trained_length, 2) + 1) - 1, 1)


def logn_factors(length: int, trained_length: int) -> Tensor:
    """The factor of each query, [S]."""
    return torch.tensor([max(math.log(position, trained_length), 1.0) for position in range(1, length + 1)])


def rotary_frequencies(dim: int, base: float, alpha: float) -> Tensor:
    """Radians a position for each pair of a head, [D / 2]."""
    stretched = base * alpha ** (dim / (dim - 2))
    return stretched ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def rotate(x_BHSD: Tensor, frequency_d: Tensor) -> Tensor:
    """Turn the pair (i, i + D/2) of the vector at position p by the angle p x frequency i."""
    angle_Sd = torch.arange(x_BHSD.shape[-2], dtype=torch.float32)[:, None] * frequency_d
    real, imaginary = x_BHSD.chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle_Sd), angle_Sd)
    return torch.cat((turned.real, turned.imag), dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config["hidden_size"]))
        self.eps = config["layer_norm_epsilon"]

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.weight * x_BSE / (x_BSE.square().mean(-1, keepdim=True) + self.eps).sqrt()


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        hidden = config["hidden_size"]
        self.c_attn = nn.Linear(hidden, 3 * hidden)
        self.c_proj = nn.Linear(hidden, hidden, bias=not config["no_bias"])

    def forward(self, x_BSE: Tensor, alpha: float) -> Tensor:
        config, length = self.config, x_BSE.shape[1]
        heads, dim = config["num_attention_heads"], config["kv_channels"]
        # [B, S, 3, H, D] -> three of [B, H, S, D]
        q_BHSD, k_BHSD, v_BHSD = self.c_attn(x_BSE).unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4)
        frequency_d = rotary_frequencies(dim, config["rotary_emb_base"], alpha)
        q_BHSD, k_BHSD = rotate(q_BHSD, frequency_d), rotate(k_BHSD, frequency_d)
        if config["use_logn_attn"] and not self.training:
            q_BHSD = q_BHSD * logn_factors(length, config["seq_length"])[:, None]
        scale = dim**-0.5 if config["scale_attn_weights"] else 1.0
        scores_BHST = torch.einsum("bhsd,bhtd->bhst", q_BHSD, k_BHSD) * scale
        visible_ST = torch.ones(length, length, dtype=torch.bool).tril()
        weights_BHST = scores_BHST.where(visible_ST, float("-inf")).softmax(-1)
        return self.c_proj(torch.einsum("bhst,bhtd->bshd", weights_BHST, v_BHSD).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner, bias = config["hidden_size"], config["intermediate_size"] // 2, not config["no_bias"]
        self.w1 = nn.Linear(hidden, inner, bias=bias)
        self.w2 = nn.Linear(hidden, inner, bias=bias)
        self.c_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.c_proj(self.w1(x_BSE) * F.silu(self.w2(x_BSE)))


class Block(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config)
        self.attn = Attention(config)
        self.ln_2 = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x_BSE: Tensor, alpha: float) -> Tensor:
        x_BSE = x_BSE + self.attn(self.ln_1(x_BSE), alpha)
        return x_BSE + self.mlp(self.ln_2(x_BSE))


class Transformer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.wte = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.h = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))
        self.ln_f = RMSNorm(config)

    def forward(self, ids_BS: Tensor, alpha: float) -> Tensor:
        x_BSE = self.wte(ids_BS)
        for block in self.h:
            x_BSE = block(x_BSE, alpha)
        return self.ln_f(x_BSE)


class Reference(nn.Module):
    """Qwen 1.0 as its config.json describes it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        if config["kv_channels"] * config["num_attention_heads"] != config["hidden_size"]:
            raise ValueError(f"kv_channels={config['kv_channels']} is not hidden_size / num_attention_heads")
        if config["rotary_pct"] != 1.0:
            raise ValueError(f"rotary_pct={config['rotary_pct']}: only 1.0 is known")
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, ids_BS: Tensor, prompt_length: int | None = None) -> Tensor:
        """The logits, [B, S, V]; `prompt_length`, if given, takes the place of the length that NTK looks at."""
        alpha = 1.0
        if self.config["use_dynamic_ntk"] and not self.training:
            alpha = ntk_alpha(prompt_length or ids_BS.shape[1], self.config["seq_length"])
        return self.lm_head(self.transformer(ids_BS, alpha))

    def next_logits(self, ids_BS: Tensor, prompt_length: int) -> Tensor:
        """The last token's logits [B, V] in the published generation, whose prompt had `prompt_length` tokens."""
        return self(ids_BS, prompt_length)[:, -1]


def make(variant: str, seed: int = 0, **changes: Any) -> Reference:
    """A random tiny model in fp32 and eval mode; `changes` replace fields of the variant's config."""
    model = Reference({**TINY[variant], **changes}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln_" in name else 0.0, 0.12, generator=generator)
    return model
