"""DeepSeekMoE 16B (model_type "deepseek"), written out plainly: what the Megatron side is held to.

Written from the paper (arXiv 2401.06066), the config fields and tensor names of deepseek-ai/deepseek-moe-16b-base, and
the behaviour of the modeling code published beside the weights. Not copied from it.

Attention is Llama's (RMSNorm, rotary over halves, grouped keys and values, no bias unless `attention_bias`). Layer l
is a mixture of experts if `l >= first_k_dense_replace and l % moe_layer_freq == 0`, else a dense SwiGLU of
`intermediate_size`. In a mixture

    p = softmax(x @ gate.T);  w = p of the k largest, divided by their sum if norm_topk_prob (and k > 1)
    y = sum_k w_k * expert_k(x) + shared(x)

where `shared` is one SwiGLU n_shared_experts times as wide as an expert, always on and not gated. There is no
scaling factor. The published config.json does not spell out `aux_loss_alpha` (0.001) and `seq_aux` (true), its config
class's defaults: they add a balance loss's gradient in training and change no logit.

Not known here: the balance loss, `rope_scaling`, any `scoring_func` but softmax, tied embeddings, attention dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

# Shape letters: B batch, S sequence, T keys (= S), H hidden, N heads, D head, E experts, V vocabulary.

_BASE: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "model_type": "deepseek",
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 200,
}

TINY: dict[str, dict[str, Any]] = {
    "base": _BASE,
    "normed": {**_BASE, "norm_topk_prob": True, "aux_loss_alpha": 0.001, "seq_aux": True},
    "odd": {**_BASE, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "rope_theta": 500.0},
    "alternate": {**_BASE, "moe_layer_freq": 2, "n_shared_experts": 1},
    "unshared": {**_BASE, "first_k_dense_replace": 0, "n_shared_experts": None, "norm_topk_prob": True},
    "biased": {**_BASE, "attention_bias": True, "num_key_value_heads": 4},
}


def is_mixture(config: dict[str, Any], layer: int) -> bool:
    return layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0


def rotate(x_BNSD: Tensor, theta: float) -> Tensor:
    """Rotary embedding by the place in the sequence: dimension d turns with d + D/2."""
    length, width = x_BNSD.shape[-2:]
    speed_D = theta ** (-torch.arange(0, width, 2) / width)
    turn_SD = torch.polar(torch.ones(length, width // 2), torch.outer(torch.arange(length), speed_D))
    turned_BNSD = torch.complex(*x_BNSD.chunk(2, dim=-1)) * turn_SD
    return torch.cat([turned_BNSD.real, turned_BNSD.imag], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, bias = config["hidden_size"], config["attention_bias"]
        self.width, self.theta = hidden // config["num_attention_heads"], config["rope_theta"]
        self.q_proj = nn.Linear(hidden, hidden, bias=bias)
        self.k_proj = nn.Linear(hidden, config["num_key_value_heads"] * self.width, bias=bias)
        self.v_proj = nn.Linear(hidden, config["num_key_value_heads"] * self.width, bias=bias)
        self.o_proj = nn.Linear(hidden, hidden, bias=bias)

    def forward(self, x_BSH: Tensor) -> Tensor:
        q_BNSD, k_BNSD, v_BNSD = (
            projection(x_BSH).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        group = q_BNSD.shape[1] // k_BNSD.shape[1]
        q_BNSD, k_BNSD = rotate(q_BNSD, self.theta), rotate(k_BNSD, self.theta).repeat_interleave(group, dim=1)
        scores_BNST = q_BNSD @ k_BNSD.transpose(-1, -2) * self.width**-0.5
        future_ST = torch.ones(scores_BNST.shape[-2:], dtype=torch.bool).triu(1)
        weights_BNST = scores_BNST.masked_fill(future_ST, float("-inf")).softmax(-1)
        return self.o_proj((weights_BNST @ v_BNSD.repeat_interleave(group, dim=1)).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x_BSH)) * self.up_proj(x_BSH))


class Mixture(nn.Module):
    """Every expert looks at every token, and a weight of zero hides it: slow, and plainly right."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner, shared = config["hidden_size"], config["moe_intermediate_size"], config["n_shared_experts"]
        self.topk = config["num_experts_per_tok"]
        self.normed = config["norm_topk_prob"] and self.topk > 1
        self.gate = nn.Linear(hidden, config["n_routed_experts"], bias=False)
        self.experts = nn.ModuleList(SwiGLU(hidden, inner) for _ in range(config["n_routed_experts"]))
        self.shared_experts = SwiGLU(hidden, inner * shared) if shared is not None else None

    def weights(self, x_BSH: Tensor) -> Tensor:
        """How much of each expert a token takes: [B, S, E], zero but for the chosen."""
        p_BSE = self.gate(x_BSH).softmax(-1)
        best, chosen = p_BSE.topk(self.topk, dim=-1)
        if self.normed:
            best = best / (best.sum(-1, keepdim=True) + 1e-20)
        return torch.zeros_like(p_BSE).scatter(-1, chosen, best)

    def forward(self, x_BSH: Tensor) -> Tensor:
        weights_BSE = self.weights(x_BSH)
        y_BSH = sum(weights_BSE[..., [e]] * expert(x_BSH) for e, expert in enumerate(self.experts))
        return y_BSH if self.shared_experts is None else y_BSH + self.shared_experts(x_BSH)


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any], number: int) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.input_layernorm = RMSNorm(hidden, config["rms_norm_eps"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(hidden, config["rms_norm_eps"])
        self.mlp = Mixture(config) if is_mixture(config, number) else SwiGLU(hidden, config["intermediate_size"])

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSH = x_BSH + self.self_attn(self.input_layernorm(x_BSH))
        return x_BSH + self.mlp(self.post_attention_layernorm(x_BSH))


class Model(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSH = self.embed_tokens(ids_BS)
        for layer in self.layers:
            x_BSH = layer(x_BSH)
        return self.norm(x_BSH)


class Reference(nn.Module):
    """Logits of a DeepSeekMoE from ids."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        if config["rope_scaling"] is not None or config["scoring_func"] != "softmax" or config["tie_word_embeddings"]:
            raise ValueError("only rope_scaling=None, scoring_func='softmax', untied embeddings are described here")
        self.model = Model(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        return self.lm_head(self.model(ids_BS))


def make(variant: str, seed: int = 0, **changes: Any) -> Reference:
    """A random model in fp32, eval mode. Routers are wider, so that a token's preferences are clear."""
    torch.manual_seed(seed)
    model = Reference({**TINY[variant], **changes}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.5 if name.endswith("mlp.gate.weight") else 0.12)
    return model
