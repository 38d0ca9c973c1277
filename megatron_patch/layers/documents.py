"""Documents that share a row without knowing of one another: attention within each, positions from each one's start.

`separate_documents` amends a built GPTModel. Where each token's document starts is read from the token ids, or comes
with the batch, and travels through the layers in the place of a mask, [B, S] instead of [B, 1, S, S]: a recomputed
layer, or one of several micro-batches under way in a pipeline, so always meets its own. `attend_documents` gathers
documents of like length into one batch, padded at their end, where a causal query never looks; no mask is made at all.
What a row holds behind its last document attends to nothing, and nothing to it.

A document ends with its end-of-document token, or where the batch says. It does not know where the ids come from, nor
whose documents they are.

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
        starts_BS: from `document_starts`, on the host: how much there is to compute depends on it. -1 where there is
            only padding, behind the documents of a row.
        attend: causal attention over whole rows, [N, H, L, D] each.

    Returns:
        [S, B, H * D]; zeros for padding.

    Raises:
        ValueError: there is nothing but padding.
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
    found, place = torch.cat(contexts), torch.cat(places).to(flat[0].device)
    whole = found.new_zeros(batch * size, *found.shape[1:]).index_copy(0, place, found)
    return whole.unflatten(0, (batch, size)).transpose(0, 1).flatten(2)


def _alike(starts_BS: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """First token (in the row-major order of all) and length of the documents, in groups, the longest ones first."""
    is_begin = (starts_BS == torch.arange(starts_BS.shape[1])).flatten()
    begins, document = is_begin.nonzero()[:, 0], is_begin.cumsum(0) - 1
    if not len(begins):
        raise ValueError("rows of padding alone: give each a document, if one of a single token")
    lengths, order = document[starts_BS.flatten() >= 0].bincount().sort(descending=True)
    begins, first = begins[order], 0
    while first < len(lengths):
        last = int((lengths >= _LIKE * lengths[first]).sum())
        yield begins[first:last], lengths[first:last]
        first = last


def separate_documents(
    model: GPTModel,
    eod: int | None,
    length: int,
    *,
    positions: bool,
    attention: bool,
    flags: str = "--reset-position-ids and --reset-attention-mask",
    instead: str = "leave them out",
) -> None:
    """Amends a built model.

    Args:
        eod: the token that ends a document; None where the model is called with the documents' starts in place of an
            attention mask: [B, S], as `attend_documents` takes them.
        length: tokens of a row.
        positions: rotary angles follow the position ids that the model is called with, which restart with every
            document (learned position embeddings follow them anyway).
        attention: no token sees another document's.
        flags: what the user calls this, for messages.
        instead: what to do where the model cannot.

    Raises:
        ValueError: the model cannot do it.
    """
    problems = [f"{problem}; {instead}" for problem in _shared_problems(model)]
    problems += _position_problems(model, length, attention) if positions else []
    if problems:
        raise ValueError("\n".join(f"{flags}: {problem}" for problem in problems))
    hook = partial(_separate, eod, positions, attention)
    model.register_forward_pre_hook(hook, with_kwargs=True)


def _separate(
    eod: int | None, positions: bool, attention: bool, model: GPTModel, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model's arguments, as a forward pre-hook of it."""
    given = signature(model.forward).bind(*inputs, **options).arguments
    if attention and eod is not None:
        if given.get("attention_mask") is not None:
            raise ValueError("attention_mask: documents are told apart by their ids; give None")
        given["attention_mask"] = document_starts(given["input_ids"], eod).cpu()
    if positions and isinstance(rotary := getattr(model, "rotary_pos_emb", None), Rotary):
        rotary.positions_SBA = given["position_ids"].T[..., None]
    return (), given


def _shared_problems(model: GPTModel) -> list[str]:
    if hasattr(model, "prefix"):
        return ["this model reads the beginning of a row as the context of all that follows"]
    if model.config.mtp_num_layers:
        return ["multi-token prediction would reach into the next document"]
    return []


def _position_problems(model: GPTModel, length: int, attention: bool) -> list[str]:
    """Why positions cannot restart. Where only distances count and no other document is seen, they need not."""
    rotary = getattr(model, "rotary_pos_emb", None)
    if isinstance(rotary, Rotary):
        rope = rotary.rope
        if rope.rope_type in BY_LENGTH and length > rope.max_position_embeddings:
            return [
                f"rope_type={rope.rope_type!r} turns by the length of the whole row beyond "
                f"{rope.max_position_embeddings} tokens; give --seq-length {rope.max_position_embeddings} or less"
            ]
    elif model.position_embedding_type != "learned_absolute" and not attention:
        return ["this model knows distances only; give --reset-attention-mask as well"]
    return []
