"""ChatGLM-6B (the first one) in plain torch: 2-D rotary positions, a prefix mask, scaled residuals.

Written from the model card and the published configuration, tensor names and formulas of THUDM/chatglm-6b. GLM
(arXiv:2103.10360) is the source of the two positions, DeepNorm (arXiv:2203.00555) of the residual's factor.

It knows only what the published checkpoint uses: `position_encoding_2d`, no p-tuning prefix, no quantised weights.
Three published habits are easily missed, and kept here:
- `lm_head.weight` is in the checkpoint *and* tied to the embeddings (the config is silent, and the default is tied).
- Rotary frequencies are rounded to float16 once, whatever the dtype of the model: 0.01 is really 0.010002136.
- The residual adds the *normed* input: x = alpha ln(x) + f(ln(x)). The published code fixes alpha to sqrt(2 * 28), its
  only depth; here it is sqrt(2 * num_layers), which is what that number stands for.
Scores that are divided by the layer's number and multiplied again are left out: they change nothing in float32.

Shapes: B rows, S and T tokens, N heads, D channels of a head, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_BASE = {
    "_name_or_path": "THUDM/chatglm-6b",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "bos_token_id": 194,
    "eos_token_id": 195,
    "mask_token_id": 190,
    "gmask_token_id": 191,
    "pad_token_id": 3,
    "hidden_size": 64,
    "inner_hidden_size": 192,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 64,
    "model_type": "chatglm",
    "num_attention_heads": 8,
    "num_layers": 4,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "transformers_version": "4.23.1",
    "use_cache": True,
    "vocab_size": 200,
}

# "saved" is what save_pretrained writes: the same model with the defaults of the configuration class spelt out.
TINY: dict[str, dict[str, Any]] = {
    "base": _BASE,
    "odd": {**_BASE, "num_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "inner_hidden_size": 96},
    "saved": {**_BASE, "pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0},
}


def make(variant: str, seed: int = 0, **changes: Any) -> Reference:
    """The tiny model of a variant with random weights, in eval mode. `changes` replace fields of its config."""
    model = Reference({**TINY[variant], **changes})
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean = 1.0 if name.endswith("layernorm.weight") else 0.0
        nn.init.normal_(parameter, mean, 0.12, generator)
    return model.eval()


def ids(variant: str, batch: int, length: int, seed: int = 0) -> Tensor:
    """Rows of random ids, each with a context that ends before its BOS; BOS stands at another place in each row.

    Rows take turns: [gMASK] right before BOS (what the tokenizer makes), [MASK] two tokens before BOS (a blank inside
    the text, so the frozen position is not the last one of the context), and both at once (where [gMASK] wins).
    The random ids hold no special token. At least 5 tokens a row, and 3 rows for all the kinds.
    """
    config = TINY[variant]
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(4, config["mask_token_id"], (batch, length), generator=generator)
    places = (torch.randperm(length - 3, generator=generator) + 3).tolist()
    for row, ids_S in enumerate(ids_BS):
        bos = places[row % len(places)]
        ids_S[bos] = config["bos_token_id"]
        if row % 3 != 1:
            ids_S[bos - 1] = config["gmask_token_id"]
        if row % 3 != 0:
            ids_S[bos - 2] = config["mask_token_id"]
    return ids_BS


def _first(ids_S: Tensor, token: int, name: str) -> int:
    found = (ids_S == token).nonzero()
    if len(found) == 0:
        raise ValueError(f"no {name} ({token}) in {ids_S.tolist()}: the mask and the positions are worked out from it")
    return int(found[0])


def context_length(ids_S: Tensor, config: dict[str, Any]) -> int:
    """Tokens before the first BOS."""
    return _first(ids_S, config["bos_token_id"], "bos_token_id")


def positions(ids_BS: Tensor, config: dict[str, Any]) -> Tensor:
    """(B, 2, S): positions, then block positions.

    Positions count from 0 over the context; from BOS on all stand at the place of the row's first [gMASK], or of its
    first [MASK] when it has no [gMASK]. Block positions are 0 over the context and count 1, 2, ... from BOS on.
    """
    rows = []
    for ids_S in ids_BS:
        has_gmask = bool((ids_S == config["gmask_token_id"]).any())
        name = "gmask_token_id" if has_gmask else "mask_token_id"
        context = context_length(ids_S, config)
        position_S = torch.arange(len(ids_S))
        block_S = (position_S - context + 1).clamp(min=0)
        position_S[context:] = _first(ids_S, config[name], name)
        rows.append(torch.stack((position_S, block_S)))
    return torch.stack(rows)


def visible(ids_BS: Tensor, config: dict[str, Any]) -> Tensor:
    """(B, S, T), true where token S sees token T: everything in the context, and what lies behind."""
    length = ids_BS.shape[1]
    causal_ST = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.stack([causal_ST | (torch.arange(length) < context_length(ids_S, config)) for ids_S in ids_BS])


def frequencies(dim: int) -> Tensor:
    """The dim / 2 rotary frequencies, rounded to float16 as the published model stores them."""
    return (10000 ** (-torch.arange(0, dim, 2, device="cpu").float() / dim)).half().float()


def rotate(x_BSND: Tensor, position_BS: Tensor) -> Tensor:
    """Turn channel i with channel i + D/2 by the token's position times frequency i."""
    angle_BS1F = position_BS[..., None, None] * frequencies(x_BSND.shape[-1])
    cos, sin = angle_BS1F.cos(), angle_BS1F.sin()
    a, b = x_BSND.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotate_2d(x_BSND: Tensor, position_B2S: Tensor) -> Tensor:
    """Positions turn the first half of a head's channels, block positions the second half."""
    first, second = x_BSND.chunk(2, dim=-1)
    return torch.cat((rotate(first, position_B2S[:, 0]), rotate(second, position_B2S[:, 1])), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, x_BSH: Tensor, position_B2S: Tensor, visible_BST: Tensor) -> Tensor:
        # The rows of the stacked weight: for each head its query, its key, its value.
        qkv_BSN3D = self.query_key_value(x_BSH).unflatten(-1, (self.heads, 3, -1))
        q_BSND, k_BTND, v_BTND = qkv_BSN3D.unbind(-2)
        q_BSND, k_BTND = rotate_2d(q_BSND, position_B2S), rotate_2d(k_BTND, position_B2S)
        score_BNST = torch.einsum("bsnd,btnd->bnst", q_BSND, k_BTND) / math.sqrt(q_BSND.shape[-1])
        weight_BNST = score_BNST.masked_fill(~visible_BST[:, None], -math.inf).softmax(-1)
        return self.dense(torch.einsum("bnst,btnd->bsnd", weight_BNST, v_BTND).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config["hidden_size"], config["inner_hidden_size"])
        self.dense_4h_to_h = nn.Linear(config["inner_hidden_size"], config["hidden_size"])

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(x_BSH), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["layernorm_epsilon"]
        self.alpha = math.sqrt(2 * config["num_layers"])
        self.input_layernorm = nn.LayerNorm(hidden, eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(hidden, eps)
        self.mlp = MLP(config)

    def forward(self, x_BSH: Tensor, position_B2S: Tensor, visible_BST: Tensor) -> Tensor:
        normed_BSH = self.input_layernorm(x_BSH)
        x_BSH = self.alpha * normed_BSH + self.attention(normed_BSH, position_B2S, visible_BST)
        normed_BSH = self.post_attention_layernorm(x_BSH)
        return self.alpha * normed_BSH + self.mlp(normed_BSH)


class Transformer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_layers"]))
        self.final_layernorm = nn.LayerNorm(config["hidden_size"], config["layernorm_epsilon"])

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSH = self.word_embeddings(ids_BS)
        position_B2S, visible_BST = positions(ids_BS, self.config), visible(ids_BS, self.config)
        for layer in self.layers:
            x_BSH = layer(x_BSH, position_B2S, visible_BST)
        return self.final_layernorm(x_BSH)


class Reference(nn.Module):
    """ids (B, S) -> logits (B, S, V). Every row needs a BOS, and a [gMASK] or a [MASK]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        for field, value in {"position_encoding_2d": True, "pre_seq_len": None, "quantization_bit": 0}.items():
            if config.get(field, value) != value:
                raise ValueError(f"{field}={config[field]!r}: only {value!r} is known here")
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        if config.get("tie_word_embeddings", True):
            self.lm_head.weight = self.transformer.word_embeddings.weight

    def forward(self, ids_BS: Tensor) -> Tensor:
        return self.lm_head(self.transformer(ids_BS))
