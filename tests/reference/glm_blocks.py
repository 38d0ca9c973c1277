"""GLM with block infilling (glm-10b, glm-2b, glm-large), written out plainly: what the Megatron side is held to.

Written from the GLM paper (arXiv 2103.10360), the config fields and tensor names of THUDM/glm-10b, and the behaviour
of the modeling and tokenizer code that was published beside the weights. Not copied from either.

The layer is GPT-2's: LayerNorm with bias before attention and before the MLP, biases everywhere, tanh-GELU of width
4h, logits from the word embeddings. Two learned tables are added to the embedding: positions and block positions.

What the published model is told by its caller is worked out here from the ids, as its tokenizer builds it
(`build_inputs_for_generation`). With sop = <|startofpiece|>, sep = the first sop's index and m = the index of the first
[MASK], [sMASK] or [gMASK] before sep (leftmost of all three kinds):

    position_i = i       if i < sep else m            (m stays for every generated token, for [gMASK] too)
    block_i    = 0       if i < sep else i - sep + 1  (so sop itself is 1)
    i sees j  <=>  j <= i or j < sep

Without sop the model is called with ids alone: position_i = i, block_i = 0, causal (sep = 0). A sop without a mask
before it is refused, as the tokenizer refuses it. Later sops are ordinary tokens (generation writes one piece).

`attention_scale` changes no result: scores are divided by it, their maximum is taken off, and they are multiplied
back. It only keeps half precision in range.

The activation is disputed: the pretraining code (and two ports) use the tanh form, the class published on the hub
calls the erf form. The weights were trained with tanh, so tanh it is.

Not known here: padding, the cache of layer inputs ("mems"), classification heads, several pieces in one row,
`block_position_encoding=False` and `relative_encoding=True` (no published checkpoint has them).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

# Shape letters: B batch, S sequence, T keys (= S), H hidden, N heads, D head, V vocabulary.

# The published config.json names no special token. The ids of the two published vocabularies, by vocab_size; a config
# may name others in fields of these names, which are ours.
SPECIAL: dict[int, dict[str, int]] = {
    50304: dict(sop_token_id=50257, mask_token_id=50260, gmask_token_id=50263, smask_token_id=50264),
    50048: dict(sop_token_id=50006, mask_token_id=50003, gmask_token_id=50009, smask_token_id=50008),
}

_BASE: dict[str, Any] = {
    "architectures": ["GLMModel"],
    "attention_dropout_prob": 0.0,
    "attention_scale": 1.0,
    "auto_map": {
        "AutoConfig": "configuration_glm.GLMConfig",
        "AutoModel": "modeling_glm.GLMModel",
        "AutoModelForSeq2SeqLM": "modeling_glm.GLMForConditionalGeneration",
    },
    "block_position_encoding": True,
    "checkpoint_activations": False,
    "checkpoint_num_layers": 1,
    "embedding_dropout_prob": 0.0,
    "hidden_size": 48,
    "initializer_range": 0.02,
    "max_memory_length": 0,
    "max_sequence_length": 64,
    "model_type": "glm",
    "num_attention_heads": 8,
    "num_layers": 4,
    "output_dropout_prob": 0.0,
    "output_predict": True,
    "parallel_output": True,
    "pool_token": "cls",
    "relative_encoding": False,
    "spell_func": "lstm",
    "spell_length": None,
    "vocab_size": 200,
    "sop_token_id": 190,
    "mask_token_id": 192,
    "gmask_token_id": 193,
    "smask_token_id": 194,
}

TINY: dict[str, dict[str, Any]] = {
    "base": _BASE,
    "odd": {**_BASE, "num_layers": 3, "num_attention_heads": 6},
    "scaled": {**_BASE, "attention_scale": 8.0},
    "prefixed": {**_BASE, "architectures": ["GLMForConditionalGeneration"]},
}


def layout(ids: list[int], special: dict[str, Any]) -> tuple[list[int], list[int], int]:
    """Positions, block positions and the separation point of one row of ids; see the module's formula."""
    length = len(ids)
    if special["sop_token_id"] not in ids:
        return list(range(length)), [0] * length, 0
    sep = ids.index(special["sop_token_id"])
    masks = {special[name] for name in ("mask_token_id", "gmask_token_id", "smask_token_id")}
    places = [place for place in range(sep) if ids[place] in masks]
    if not places:
        raise ValueError(f"sop at {sep} has no [MASK], [sMASK] or [gMASK] before it")
    positions = [place if place < sep else places[0] for place in range(length)]
    return positions, [max(0, place - sep + 1) for place in range(length)], sep


def visible(length: int, sep: int) -> Tensor:
    """Bool [S, T]: the context sees itself, everything else looks back."""
    row, column = torch.arange(length)[:, None], torch.arange(length)[None, :]
    return (column <= row) | (column < sep)


class Attention(nn.Module):
    """query_key_value holds all queries, then all keys, then all values."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.num_heads, self.scale = config["num_attention_heads"], config["attention_scale"]
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, x_BSH: Tensor, visible_BST: Tensor) -> Tensor:
        heads = [
            part_BSH.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part_BSH in self.query_key_value(x_BSH).chunk(3, dim=-1)
        ]
        q_BNSD, k_BNSD, v_BNSD = heads
        scores_BNST = q_BNSD @ k_BNSD.transpose(-1, -2) / (q_BNSD.shape[-1] ** 0.5 * self.scale)
        scores_BNST = (scores_BNST - scores_BNST.amax(-1, keepdim=True)) * self.scale
        scores_BNST = scores_BNST.masked_fill(~visible_BST[:, None], float("-inf"))
        context_BNSD = scores_BNST.softmax(-1) @ v_BNSD
        return self.dense(context_BNSD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden, 4 * hidden)
        self.dense_4h_to_h = nn.Linear(4 * hidden, hidden)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(x_BSH), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config["hidden_size"], eps=1e-5)
        self.attention = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(config["hidden_size"], eps=1e-5)
        self.mlp = MLP(config["hidden_size"])

    def forward(self, x_BSH: Tensor, visible_BST: Tensor) -> Tensor:
        x_BSH = x_BSH + self.attention(self.input_layernorm(x_BSH), visible_BST)
        return x_BSH + self.mlp(self.post_attention_layernorm(x_BSH))


class Stack(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        # One row more than the longest text: the published tables have 1025 rows for 1024 tokens.
        rows = config["max_sequence_length"] + 1
        self.position_embeddings = nn.Embedding(rows, config["hidden_size"])
        self.block_position_embeddings = nn.Embedding(rows, config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_layers"]))
        self.final_layernorm = nn.LayerNorm(config["hidden_size"], eps=1e-5)

    def forward(self, x_BSH: Tensor, positions_BS: Tensor, blocks_BS: Tensor, visible_BST: Tensor) -> Tensor:
        x_BSH = x_BSH + self.position_embeddings(positions_BS) + self.block_position_embeddings(blocks_BS)
        for layer in self.layers:
            x_BSH = layer(x_BSH, visible_BST)
        return self.final_layernorm(x_BSH)


class Reference(nn.Module):
    """Logits of a GLM from ids alone. A GLMForConditionalGeneration keeps its tensors under `glm.`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        if not config["block_position_encoding"] or config["relative_encoding"]:
            raise ValueError("only block_position_encoding=True with relative_encoding=False is described here")
        self.special = {**SPECIAL.get(config["vocab_size"], {}), **config}
        holder: nn.Module = self
        if config["architectures"] == ["GLMForConditionalGeneration"]:
            holder = self.glm = nn.Module()
        holder.word_embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"])
        holder.transformer = Stack(config)

    def forward(self, ids_BS: Tensor) -> Tensor:
        rows = [layout(row, self.special) for row in ids_BS.tolist()]
        positions_BS = torch.tensor([positions for positions, _, _ in rows])
        blocks_BS = torch.tensor([blocks for _, blocks, _ in rows])
        visible_BST = torch.stack([visible(ids_BS.shape[1], sep) for _, _, sep in rows])
        model = getattr(self, "glm", self)
        x_BSH = model.transformer(model.word_embeddings(ids_BS), positions_BS, blocks_BS, visible_BST)
        return linear(x_BSH, model.word_embeddings.weight)


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
    rows = [[draw.randrange(config["sop_token_id"]) for _ in range(length)] for _ in range(batch)]
    for index, row in enumerate(rows):
        sep = draw.randrange(1, length - 1)
        kind = ("gmask_token_id", "mask_token_id", "smask_token_id")[index % 3]
        row[draw.randrange(sep)], row[sep] = config[kind], config["sop_token_id"]
    return torch.tensor(rows)
