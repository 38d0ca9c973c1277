"""SentencePiece models extended at tail rank, and asked which pieces a text can ever meet.

A new piece gets a score below every old one (but for Llama's pieces of several spaces, which are last anyway), so no
old merge ever gives way to a new one; and new pieces stand at the end in the order of their scores, for those who rank
merges by id.
It knows neither transformers nor what a corpus is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from megatron_patch.tokenizer.sentencepiece_model import CONTROL, NORMAL, UNUSED, USER_DEFINED, processor

RESERVED = "<|reserved_{}|>"
"""Names of the rows that only fill up."""

_EXACT = float(1 << 23)
"""Down to here each rank has a score of its own in float32."""
_LONGEST = 1 << 20


def require_bpe(proto: ModelProto, path: str | Path) -> None:
    """Raises ValueError unless the model is BPE: in a unigram model every new piece would change old text."""
    if proto.trainer_spec.model_type != TrainerSpec.BPE:
        kind = TrainerSpec.ModelType.Name(proto.trainer_spec.model_type)
        raise ValueError(f"{path} is a {kind} model; only a BPE model can be extended so that old text keeps its ids")


def normal_pieces(proto: ModelProto) -> list[str]:
    """Pieces of text, the best first; not characters' bytes, control tokens and the like."""
    found = [one for one in proto.pieces if one.type == NORMAL]
    return [one.piece for one in sorted(found, key=lambda one: -one.score)]


def extend(
    base: ModelProto,
    pieces: Sequence[str],
    pad_multiple: int = 1,
    added: Mapping[int, tuple[str, bool]] | None = None,
) -> ModelProto:
    """`base` with `pieces` at its end, in the order given, then reserved rows up to a multiple.

    Args:
        added: tokens that the base's tokenizer has after the model's own: id -> text, and whether it is special. They
            keep their ids; a gap between them becomes a reserved row.
    """
    proto = ModelProto.FromString(base.SerializeToString())
    # Llama's pieces of several spaces have -1e9, below which float32 cannot tell neighbours apart.
    score = min(one.score for one in base.pieces if one.score > -_EXACT)
    taken = {one.piece for one in base.pieces} | {text for text, _ in (added or {}).values()} | set(pieces)
    names = (name for name in map(RESERVED.format, range(_LONGEST)) if name not in taken)

    def append(piece: str, kind: int) -> None:
        nonlocal score
        score -= 1
        proto.pieces.add(piece=piece, score=score, type=kind)

    for number in range(len(base.pieces), max(added or {}, default=-1) + 1):
        text, special = (added or {}).get(number) or (next(names), None)
        append(text, UNUSED if special is None else CONTROL if special else USER_DEFINED)
    for piece in pieces:
        append(piece, NORMAL)
    while len(proto.pieces) % pad_multiple:
        append(next(names), UNUSED)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto


def reachable(proto: ModelProto, pieces: Sequence[str]) -> list[str]:
    """Those pieces that their own text is encoded to.

    No text holds any of the others: a piece comes about by the merges inside it, whatever stands around it.
    """
    bare = processor(proto, bare=True)
    ids = bare.encode(list(pieces))
    return [piece for piece, found in zip(pieces, ids, strict=True) if found == [bare.piece_to_id(piece)]]


def supported(wanted: Collection[str], pieces: Sequence[str], base: Collection[str]) -> list[str]:
    """The wanted pieces and those that they are merged from, in the order of `pieces`.

    Args:
        pieces: all new ones, in order of rank.
        base: pieces that are there anyway.
    """
    rank = {piece: number for number, piece in enumerate(pieces)} | dict.fromkeys(base, -1)
    kept, waiting = set(), list(wanted)
    while waiting:
        piece = waiting.pop()
        if piece in kept or rank[piece] < 0:
            continue
        kept.add(piece)
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        splits = [pair for pair in halves if all(half in rank for half in pair)]
        # The merge that is met first is the one whose halves are there first.
        waiting += min(splits, key=lambda pair: max(rank[half] for half in pair), default=())
    return [piece for piece in pieces if piece in kept]
