"""Texts whose beginning is read as a whole: the prefix mask and the positions of GLM, worked out from the token ids.

The context is everything before the first start token (sop, or ChatGLM-6B's BOS); all of it sees all of it, and what
follows is causal (Du et al. 2022). A mark in the context ([MASK], [gMASK]) says where the continuation belongs: each of
its tokens has the mark's position, and counts 1, 2, 3, ... in a second, the block position. A text without a start
token is causal, with plain positions; one without a mark counts on. A row is one text: packed documents are not told
apart. Whether a text has a context is decided by the prompt: tokens that are generated do not end one.

Shapes: B rows, S tokens, A positions of each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn

from megatron_patch.layers.cache import KVCache


@dataclass(frozen=True)
class Context:
    """Where each row's context ends, by its own tokens (padding does not count)."""

    length_B: Tensor
    """Tokens of the context; 0 where there is none."""

    anchor_B: Tensor
    """Position of the continuation; -1 where it counts on."""

    def rows(self, rows: Tensor) -> Context:
        """Some rows only."""
        return Context(self.length_B[rows], self.anchor_B[rows])

    def put(self, rows: Tensor, other: Context) -> None:
        """Give these rows those of another."""
        self.length_B[rows], self.anchor_B[rows] = other.length_B, other.anchor_B

    def positions(self, index_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Position and block position, [B, S] each, of tokens that stand at these places of their texts."""
        length, anchor = self.length_B[:, None], self.anchor_B[:, None]
        behind = (index_BS >= length) & (length > 0)
        return torch.where(behind & (anchor >= 0), anchor, index_BS), (index_BS - length + 1) * behind


def read_context(ids_BS: Tensor, start: int, marks: Sequence[Sequence[int]], padding_B: Tensor) -> Context:
    """Find each row's context.

    Args:
        start: the token whose first occurrence ends it.
        marks: groups of tokens; the leftmost one of the first group that the context holds is the mark.
        padding_B: slots before a row's first token.
    """
    size = ids_BS.shape[1]
    slots = torch.arange(size, device=ids_BS.device)
    real_BS = slots >= padding_B[:, None]

    def first(hit_BS: Tensor) -> Tensor:
        return torch.where(hit_BS, slots, size).amin(1)

    start_B = first(real_BS & (ids_BS == start))
    anchor_B = torch.full_like(start_B, -1)
    for group in reversed(marks):
        hit_B = first(real_BS & torch.isin(ids_BS, torch.tensor(group, device=ids_BS.device)))
        anchor_B = torch.where(hit_B < start_B, hit_B - padding_B, anchor_B)
    return Context((start_B - padding_B) * (start_B < size), anchor_B)


class PrefixReader(nn.Module):
    """Gives a GPTModel the positions and the mask that its ids ask for, before it sees them."""

    def __init__(self, start: int, marks: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.start, self.marks = start, marks
        self.kv_cache: KVCache | None = None
        self.blocks_BS: Tensor | None = None
        """Block positions of the tokens that the model is working on."""

        self.counts_BS: Tensor | None = None
        """Which positions have something to predict that they do not see."""

    def forward(self, model: GPTModel, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The model's arguments, as a forward pre-hook of it.

        Raises:
            ValueError: a mask was given, or a row of training holds several texts.
        """
        given = signature(model.forward).bind(*inputs, **options).arguments
        ids_BS = given["input_ids"]
        if given.get("attention_mask") is not None:
            raise ValueError("attention_mask: this model's mask follows from its ids; give None")
        index_BS, context = self._context(ids_BS)
        positions_BS, self.blocks_BS = context.positions(index_BS)
        if model.training:
            self._refuse_several_texts(ids_BS)
        # Inside the context every token sees the next one.
        self.counts_BS = index_BS >= context.length_B[:, None] - 1
        if (rotary := getattr(model, "rotary_pos_emb", None)) is not None:
            axes = (positions_BS.T, self.blocks_BS.T)[: rotary.rope.axes]
            rotary.positions_SBA = torch.stack(axes, dim=-1)
        mask = _hidden(index_BS, context) if self.kv_cache is None else None
        return (), {**given, "position_ids": positions_BS, "attention_mask": mask}

    def _refuse_several_texts(self, ids_BS: Tensor) -> None:
        texts = int((ids_BS == self.start).sum(1).max())
        if texts > 1:
            raise ValueError(
                f"a row of training data has {texts} start tokens (id {self.start}): what stands before one is read as"
                " a whole, so a row must be one text; tokenize documents without special tokens, or pad one per row"
            )

    def _context(self, ids_BS: Tensor) -> tuple[Tensor, Context]:
        cache = self.kv_cache
        if cache is None:
            index_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
            return index_BS, read_context(ids_BS, self.start, self.marks, index_BS.new_zeros(len(ids_BS)))
        if cache.context is None:
            cache.context = read_context(ids_BS, self.start, self.marks, cache.padding_B)
        return cache.positions_SB().T, cache.context


def _hidden(index_BS: Tensor, context: Context) -> Tensor:
    """[B, 1, S, S], True where a query must not look, as megatron-core has it."""
    later = index_BS[:, :, None] < index_BS[:, None, :]
    return (later & (index_BS >= context.length_B[:, None])[:, None])[:, None]


def read_prefix(model: GPTModel, start: int, marks: Sequence[Sequence[int]]) -> None:
    """Amends a built model; see `read_context`."""
    model.prefix = PrefixReader(start, marks)
    model.register_forward_pre_hook(model.prefix, with_kwargs=True)


def add_block_positions(model: GPTModel, rows: int) -> None:
    """A second table of learned positions, for block positions; after `read_prefix`."""
    if hasattr(model, "embedding"):
        config, embedding = model.config, model.embedding
        embedding.block_position_embeddings = nn.Embedding(rows, config.hidden_size, dtype=config.params_dtype)
        if config.perform_initialization:
            config.embedding_init_method(embedding.block_position_embeddings.weight)
        reader = model.prefix
        embedding.position_embeddings.register_forward_hook(
            lambda _table, _inputs, output: output + embedding.block_position_embeddings(reader.blocks_BS)
        )
