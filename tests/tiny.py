"""Tiny random models and tokens that many tests share: Hugging Face Llamas of every variant; no value is 0 or 1."""

from __future__ import annotations

from typing import Any

import torch

BASE: dict[str, Any] = dict(
    vocab_size=200,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    head_dim=6,
    tie_word_embeddings=False,
)


def _rope(rope_type: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=rope_type, rope_theta=theta, **parameters))


VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": dict(num_key_value_heads=8),
    "tied": dict(tie_word_embeddings=True),
    "head_dim": dict(head_dim=10),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "theta": _rope("default", theta=500.0),
    "linear": _rope("linear", factor=4.0),
    "dynamic": dict(**_rope("dynamic", factor=4.0), max_position_embeddings=20),
    "llama3": _rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "yarn_factor": _rope("yarn", factor=4.0, attention_factor=1.3),
    "mqa": dict(num_key_value_heads=1),
}


def hf_llama(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random LlamaForCausalLM in fp32, eval mode; norms and biases are random too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.12)
    return model


def tokens(batch: int = 2, length: int = 32, vocab_size: int = 200, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
