"""GLM-130B, written out plainly: what the Megatron side is held to.

Written from the paper (arXiv 2210.02414) and from the behaviour of the published inference code, its launch arguments
and its tensor-parallel merge tool. Not copied from them.

Published facts: 70 layers, hidden 12288, 96 heads, inner 32768 (8h/3), vocabulary 150528, 2048 positions; LayerNorm
with bias, biases on every linear, logits from the word embeddings; DeepNorm with alpha = sqrt(2 * layers), in which
the *normed* input is the residual:

    a = LN1(x);  h = alpha * a + attention(a);  b = LN2(h);  out = alpha * b + mlp(b);  a last LN after all layers

GEGLU is first_half * gelu(second_half) with the erf form of GELU. query_key_value is laid out head by head:
(q, k, v) of head 0, then of head 1, which is why the merge tool concatenates it like any column-parallel weight.
The rotary embedding is one-dimensional, over the whole head, halves rotated. The published code computes its angles
in fp16, which is coarse at high positions; here they are fp32.

Positions and mask, from the ids as the published generation script builds them. With sep = the first sop's index and
m = the index of the first [MASK] before sep, else of the first [sMASK] before sep:

    position_i = i  if i < sep or there is no such m (that is, [gMASK]) else m
    i sees j  <=>  j <= i or j < sep

There are no block positions: a filled-in [MASK] keeps one position for the whole piece; a [gMASK] counts on.

Our choices, since no Hugging Face config.json was published: the field names below (the launch arguments' names,
`model_type` "glm130b", token ids as in the published tokenizer), the checkpoint merged to one tensor-parallel rank,
and a text without sop (which the script never makes): causal, position_i = i. Not known here: padding, quantized
weights, `position_encoding_2d` and `no_glu`.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

# Shape letters: B batch, S sequence, T keys (= S), H hidden, N heads, D head, V vocabulary.

_BASE: dict[str, Any] = {
    "architectures": ["GLM130B"],
    "hidden_size": 48,
    "inner_hidden_size": 128,
    "layernorm_epsilon": 1e-5,
    "layernorm_order": "post",
    "max_sequence_length": 64,
    "model_type": "glm130b",
    "no_glu": False,
    "num_attention_heads": 8,
    "num_layers": 4,
    "position_encoding_2d": False,
    "vocab_size": 200,
    "mask_token_id": 190,
    "gmask_token_id": 191,
    "smask_token_id": 192,
    "sop_token_id": 194,
    "eop_token_id": 195,
    "eos_token_id": 2,
}

TINY: dict[str, dict[str, Any]] = {
    "base": _BASE,
    "odd": {**_BASE, "num_layers": 3, "num_attention_heads": 6, "inner_hidden_size": 96},
    "epsilon": {**_BASE, "layernorm_epsilon": 1e-2},
}


def layout(ids: list[int], config: dict[str, Any]) -> tuple[list[int], int]:
    """Positions and the separation point of one row of ids; see the module's formula."""
    count_on = list(range(len(ids)))
    if config["sop_token_id"] not in ids:
        return count_on, 0
    sep = ids.index(config["sop_token_id"])
    for kind in ("mask_token_id", "smask_token_id"):
        if config[kind] in ids[:sep]:
            stay = ids.index(config[kind])
            return [place if place < sep else stay for place in count_on], sep
    return count_on, sep


def visible(length: int, sep: int) -> Tensor:
    """Bool [S, T]: what stands before sop is seen by all, the rest only by what follows it."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[:, :sep] = True
    return seen


def rotate(x_BSND: Tensor, positions_BS: Tensor) -> Tensor:
    """Rotary embedding: dimension d turns with d + D/2, by position * 10000^(-2d/D)."""
    half = x_BSND.shape[-1] // 2
    speed_D = 10000.0 ** (-torch.arange(half) / half)
    angle_BSND = (positions_BS[..., None] * speed_D)[:, :, None]
    a, b = x_BSND.split(half, dim=-1)
    cos, sin = angle_BSND.cos(), angle_BSND.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, x_BSH: Tensor, positions_BS: Tensor, visible_BST: Tensor) -> Tensor:
        q_BSND, k_BSND, v_BSND = self.query_key_value(x_BSH).unflatten(-1, (self.num_heads, -1)).chunk(3, dim=-1)
        q_BSND, k_BSND = rotate(q_BSND, positions_BS), rotate(k_BSND, positions_BS)
        scores_BNST = torch.einsum("bsnd,btnd->bnst", q_BSND, k_BSND) * q_BSND.shape[-1] ** -0.5
        weights_BNST = scores_BNST.masked_fill(~visible_BST[:, None], float("-inf")).softmax(-1)
        return self.dense(torch.einsum("bnst,btnd->bsnd", weights_BNST, v_BSND).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden, 2 * inner)
        self.dense_4h_to_h = nn.Linear(inner, hidden)

    def forward(self, x_BSH: Tensor) -> Tensor:
        value, gate = self.dense_h_to_4h(x_BSH).chunk(2, dim=-1)
        return self.dense_4h_to_h(value * gelu(gate))


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, epsilon = config["hidden_size"], config["layernorm_epsilon"]
        self.alpha = (2 * config["num_layers"]) ** 0.5
        self.input_layernorm = nn.LayerNorm(hidden, eps=epsilon)
        self.attention = Attention(hidden, config["num_attention_heads"])
        self.post_attention_layernorm = nn.LayerNorm(hidden, eps=epsilon)
        self.mlp = MLP(hidden, config["inner_hidden_size"])

    def forward(self, x_BSH: Tensor, positions_BS: Tensor, visible_BST: Tensor) -> Tensor:
        a_BSH = self.input_layernorm(x_BSH)
        b_BSH = self.post_attention_layernorm(self.alpha * a_BSH + self.attention(a_BSH, positions_BS, visible_BST))
        return self.alpha * b_BSH + self.mlp(b_BSH)


class Transformer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_layers"]))
        self.final_layernorm = nn.LayerNorm(hidden, eps=config["layernorm_epsilon"])

    def forward(self, ids_BS: Tensor, positions_BS: Tensor, visible_BST: Tensor) -> Tensor:
        x_BSH = self.word_embeddings(ids_BS)
        for layer in self.layers:
            x_BSH = layer(x_BSH, positions_BS, visible_BST)
        return linear(self.final_layernorm(x_BSH), self.word_embeddings.weight)


class Reference(nn.Module):
    """Logits of a GLM-130B from ids alone."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        if config["layernorm_order"] != "post" or config["position_encoding_2d"] or config["no_glu"]:
            raise ValueError("only layernorm_order='post', position_encoding_2d=False, no_glu=False is described here")
        self.config = config
        self.transformer = Transformer(config)

    def forward(self, ids_BS: Tensor) -> Tensor:
        positions, seps = zip(*(layout(row, self.config) for row in ids_BS.tolist()), strict=True)
        visible_BST = torch.stack([visible(ids_BS.shape[1], sep) for sep in seps])
        return self.transformer(ids_BS, torch.tensor(positions), visible_BST)


def make(variant: str, seed: int = 0, **changes: Any) -> Reference:
    """A random model in fp32, eval mode: norms around one, nothing zero."""
    torch.manual_seed(seed)
    model = Reference({**TINY[variant], **changes}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("layernorm.weight") else 0.0, 0.12)
    return model


def ids(variant: str, batch: int, length: int, seed: int = 0) -> Tensor:
    """Ids [B, S], length >= 4: each row one mask (the kinds take turns) and one sop after it, at places of its own."""
    config, draw = TINY[variant], random.Random(seed)
    masks = [config[f"{kind}_token_id"] for kind in ("gmask", "mask", "smask")]
    ids_BS = torch.tensor([[draw.randrange(3, masks[1]) for _ in range(length)] for _ in range(batch)])
    for index, row in enumerate(ids_BS):
        sep = draw.randrange(1, length - 1)
        row[sep] = config["sop_token_id"]
        row[draw.randrange(sep)] = masks[index % 3]
    return ids_BS
