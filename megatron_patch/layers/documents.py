"""Documents that share a row without knowing of one another: attention within each, positions from each one's start.

`separate_documents` amends a built GPTModel. Where each token's document starts is read from the token ids and travels
through the layers in the place of a mask, [B, S] instead of [B, 1, S, S]: a recomputed layer, or one of several
micro-batches under way in a pipeline, so always meets its own. `attend_documents` gathers documents of like length into
one batch, padded at their end, where a causal query never looks; no mask is made at all.

A document ends with its end-of-document token. It does not know where the ids come from, nor whose documents they are.

Shapes: B rows, S tokens, H heads, D head size; N documents of at most L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_patch.layers.rotary import BY_LENGTH, Rotary

_LIKE = 0.75
"""Documents at least this long, compared with the longest of them, are padded to one length and attend together."""


def document_starts(ids_BS: Tensor, eod: int) -> Tensor:
    """Where in its row each token's document starts, [B, S]. The token after an end of document starts the next."""
    index_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
    starts_BS = F.pad(ids_BS[:, :-1] == eod, (1, 0))
    return torch.where(starts_BS, index_S, 0).cummax(1).values


def attend_documents(
    states_SBHD: Sequence[Tensor], starts_BS: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Causal attention within each document.

    Args:
        states_SBHD: queries, keys and values.
        starts_BS: from `document_starts`, on the host: how much there is to compute depends on it.
        attend: causal attention over whole rows, [N, H, L, D] each.

    Returns:
        [S, B, H * D].
    """
    size, batch = states_SBHD[0].shape[:2]
    flat = [states.transpose(0, 1).flatten(0, 1) for states in states_SBHD]
    contexts, places = [], []
    for begins_N, lengths_N in _alike(starts_BS):
        offsets_L = torch.arange(int(lengths_N[0]))
        real_NL = offsets_L < lengths_N[:, None]
        # Padding repeats the last token: finite, and no real query sees it.
        index_NL = begins_N[:, None] + torch.minimum(offsets_L, lengths_N[:, None] - 1)
        chosen = index_NL.flatten().to(flat[0].device)
        parts = (one.index_select(0, chosen).unflatten(0, index_NL.shape).transpose(1, 2) for one in flat)
        context = attend(*parts).transpose(1, 2).flatten(0, 1)
        contexts.append(context.index_select(0, real_NL.flatten().nonzero()[:, 0].to(context.device)))
        places.append(index_NL[real_NL])
    order = torch.cat(places).argsort().to(flat[0].device)
    return torch.cat(contexts).index_select(0, order).unflatten(0, (batch, size)).transpose(0, 1).flatten(2)


def _alike(starts_BS: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """First token (in the row-major order of all) and length of the documents, in groups, the longest ones first."""
    begins = (starts_BS == torch.arange(starts_BS.shape[1])).flatten().nonzero()[:, 0]
    lengths, order = begins.diff(append=torch.tensor([starts_BS.numel()])).sort(descending=True)
    begins, first = begins[order], 0
    while first < len(lengths):
        last = int((lengths >= _LIKE * lengths[first]).sum())
        yield begins[first:last], lengths[first:last]
        first = last


def separate_documents(model: GPTModel, eod: int, length: int, *, positions: bool, attention: bool) -> None:
    """Amends a built model.

    Args:
        eod: the token that ends a document.
        length: tokens of a row.
        positions: rotary angles follow the position ids that the model is called with, which restart with every
            document (learned position embeddings follow them anyway).
        attention: no token sees another document's.

    Raises:
        ValueError: the model cannot do it.
    """
    problems = [*_shared_problems(model), *(_position_problems(model, length, attention) if positions else [])]
    if problems:
        raise ValueError("\n".join(problems))
    model.register_forward_pre_hook(partial(_separate, eod, positions, attention), with_kwargs=True)


def _separate(
    eod: int, positions: bool, attention: bool, model: GPTModel, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model's arguments, as a forward pre-hook of it."""
    given = signature(model.forward).bind(*inputs, **options).arguments
    if attention:
        if given.get("attention_mask") is not None:
            raise ValueError("attention_mask: documents are told apart by their ids; give None")
        given["attention_mask"] = document_starts(given["input_ids"], eod).cpu()
    if positions and isinstance(rotary := getattr(model, "rotary_pos_emb", None), Rotary):
        rotary.positions_SBA = given["position_ids"].T[..., None]
    return (), given


def _shared_problems(model: GPTModel) -> list[str]:
    flags = "--reset-position-ids and --reset-attention-mask"
    if hasattr(model, "prefix"):
        return [f"{flags}: this model reads the beginning of a row as the context of all that follows; leave them out"]
    if model.config.mtp_num_layers:
        return [f"{flags}: multi-token prediction would reach into the next document; leave them out"]
    return []


def _position_problems(model: GPTModel, length: int, attention: bool) -> list[str]:
    """Why positions cannot restart. Where only distances count and no other document is seen, they need not."""
    rotary = getattr(model, "rotary_pos_emb", None)
    if isinstance(rotary, Rotary):
        rope = rotary.rope
        if rope.rope_type in BY_LENGTH and length > rope.max_position_embeddings:
            return [
                f"--reset-position-ids: rope_type={rope.rope_type!r} turns by the length of the whole row beyond "
                f"{rope.max_position_embeddings} tokens; give --seq-length {rope.max_position_embeddings} or less"
            ]
    elif model.position_embedding_type != "learned_absolute" and not attention:
        return ["--reset-position-ids: this model knows distances only; give --reset-attention-mask as well"]
    return []
