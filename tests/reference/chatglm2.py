"""ChatGLM2-6B, ChatGLM3-6B and the GLM-4-9B published with its own code, in plain torch: one model, three configs.

Written from the model cards and the published configurations, tensor names and formulas of THUDM/chatglm2-6b,
THUDM/chatglm3-6b and THUDM/glm-4-9b-chat. The mask is plainly causal: [gMASK] is an ordinary token here.

It does not know chatglm2-6b-32k, whose `rope_ratio` divides the positions instead of multiplying the rotary base as it
does in every later checkpoint, nor p-tuning prefixes and quantised weights. `apply_query_key_layer_scaling`,
`attention_softmax_in_fp32`, `fp32_residual_connection`, `bias_dropout_fusion` and `original_rope` change nothing in
float32.

Shapes: B rows, S and T tokens, N query heads, G key and value groups, D channels of a head, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_CHATGLM2 = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 112,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 48,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 8,
    "num_layers": 4,
    "original_rope": True,
    "padded_vocab_size": 200,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 64,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_GLM4 = {
    **_CHATGLM2,
    "_name_or_path": "THUDM/glm-4-9b-chat",
    "layernorm_epsilon": 1.5625e-07,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_layers": 3,
    "rope_ratio": 500,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.30.2",
    "eos_token_id": [197, 198, 199],
    "pad_token_id": 197,
}

# The two last are flags of the configuration class that no published checkpoint sets.
TINY: dict[str, dict[str, Any]] = {
    "chatglm2": _CHATGLM2,
    "chatglm3": {
        **_CHATGLM2,
        "_name_or_path": "THUDM/chatglm3-6b",
        "vocab_size": 200,
        "classifier_dropout": None,
        "pre_seq_len": None,
        "prefix_projection": False,
        "quantization_bit": 0,
    },
    "glm4": _GLM4,
    "no_final_norm": {**_GLM4, "post_layer_norm": False, "add_qkv_bias": False},
    "layernorm": {
        **_CHATGLM2,
        "rmsnorm": False,
        "add_bias_linear": True,
        "multi_query_attention": False,
        "apply_residual_connection_post_layernorm": True,
    },
}


def make(variant: str, seed: int = 0, **changes: Any) -> Reference:
    """The tiny model of a variant with random weights, in eval mode. `changes` replace fields of its config."""
    model = Reference({**TINY[variant], **changes})
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean = 1.0 if name.endswith("layernorm.weight") else 0.0
        nn.init.normal_(parameter, mean, 0.12, generator)
    return model.eval()


def rotate(x_BSND: Tensor, base: float) -> Tensor:
    """Turn the first half of a head's channels in neighbouring pairs (0, 1), (2, 3), ...; the second half stays."""
    dim = x_BSND.shape[-1] // 2
    frequency_F = base ** (-torch.arange(0, dim, 2).float() / dim)
    angle_S1F = torch.arange(x_BSND.shape[1])[:, None, None] * frequency_F
    cos, sin = angle_S1F.cos(), angle_S1F.sin()
    even, odd = x_BSND[..., 0:dim:2], x_BSND[..., 1:dim:2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned, x_BSND[..., dim:]), dim=-1)


def norm(config: dict[str, Any]) -> nn.Module:
    kind = nn.RMSNorm if config["rmsnorm"] else nn.LayerNorm
    return kind(config["hidden_size"], eps=config["layernorm_epsilon"])


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.channels = config["num_attention_heads"], config["kv_channels"]
        self.grouped = config["multi_query_attention"]
        self.groups = config["multi_query_group_num"] if self.grouped else self.heads
        self.base = 10000.0 * config.get("rope_ratio", 1)
        hidden, linear_bias = config["hidden_size"], config["add_bias_linear"]
        rows = (self.heads + 2 * self.groups) * self.channels
        self.query_key_value = nn.Linear(hidden, rows, bias=linear_bias or config["add_qkv_bias"])
        self.dense = nn.Linear(self.heads * self.channels, hidden, bias=linear_bias)

    def split(self, qkv_BSR: Tensor) -> tuple[Tensor, ...]:
        """Rows: all queries, all keys, all values; without groups, each head's query, key and value together."""
        if not self.grouped:
            return qkv_BSR.unflatten(-1, (self.heads, 3, self.channels)).unbind(-2)
        counts = (self.heads, self.groups, self.groups)
        return qkv_BSR.unflatten(-1, (-1, self.channels)).split(counts, dim=-2)

    def forward(self, x_BSH: Tensor) -> Tensor:
        q_BSND, k_BTGD, v_BTGD = self.split(self.query_key_value(x_BSH))
        q_BSND, k_BTGD = rotate(q_BSND, self.base), rotate(k_BTGD, self.base)
        k_BTND, v_BTND = (x.repeat_interleave(self.heads // self.groups, dim=2) for x in (k_BTGD, v_BTGD))
        score_BNST = torch.einsum("bsnd,btnd->bnst", q_BSND, k_BTND) / math.sqrt(self.channels)
        future_ST = torch.ones(score_BNST.shape[-2:], dtype=torch.bool).triu(1)
        weight_BNST = score_BNST.masked_fill(future_ST, -math.inf).softmax(-1)
        return self.dense(torch.einsum("bnst,btnd->bsnd", weight_BNST, v_BTND).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner, bias = config["hidden_size"], config["ffn_hidden_size"], config["add_bias_linear"]
        self.dense_h_to_4h = nn.Linear(hidden, 2 * inner, bias=bias)
        self.dense_4h_to_h = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x_BSH: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x_BSH).chunk(2, dim=-1)
        return self.dense_4h_to_h(functional.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.residual_is_normed = config["apply_residual_connection_post_layernorm"]
        self.input_layernorm = norm(config)
        self.self_attention = Attention(config)
        self.post_attention_layernorm = norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BSH: Tensor) -> Tensor:
        normed_BSH = self.input_layernorm(x_BSH)
        x_BSH = (normed_BSH if self.residual_is_normed else x_BSH) + self.self_attention(normed_BSH)
        normed_BSH = self.post_attention_layernorm(x_BSH)
        return (normed_BSH if self.residual_is_normed else x_BSH) + self.mlp(normed_BSH)


class Encoder(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_layers"]))
        if config["post_layer_norm"]:
            self.final_layernorm = norm(config)

    def forward(self, x_BSH: Tensor) -> Tensor:
        for layer in self.layers:
            x_BSH = layer(x_BSH)
        return self.final_layernorm(x_BSH) if hasattr(self, "final_layernorm") else x_BSH


class Embedding(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config["padded_vocab_size"], config["hidden_size"])


class Transformer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config["hidden_size"], config["padded_vocab_size"], bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        return self.output_layer(self.encoder(self.embedding.word_embeddings(ids_BS)))


class Reference(nn.Module):
    """ids (B, S) -> logits (B, S, V)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        for field, value in {"pre_seq_len": None, "quantization_bit": 0, "tie_word_embeddings": False}.items():
            if config.get(field, value) != value:
                raise ValueError(f"{field}={config[field]!r}: only {value!r} is known here")
        self.transformer = Transformer(config)

    def forward(self, ids_BS: Tensor) -> Tensor:
        return self.transformer(ids_BS)
