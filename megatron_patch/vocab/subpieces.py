"""Which old tokens the text of a new token is made of: what its row is computed from.

    old, new = load_tokenizer("base"), load_tokenizer("merged")
    growth = compare(old, new, rows=32_000)         # growth.sources[32_000] == (30_408, 30_204)

The old model's merges are applied to the token itself, not to a text: so nothing is put before it (a SentencePiece
model would), and tokens that are no whole characters (of a byte-level BPE) have their parts as well.
It knows tokenizers of every kind, and no weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megatron_patch.tokenizer import Tokenizer
from megatron_patch.tokenizer.sentencepiece_model import SPACE, processor
from megatron_patch.vocab.byte_level import spell, spells_bytes

Sources = Mapping[int, tuple[int, ...]]
"""New id -> old ids in the order of its text; none where the token has no text of its own (reserved rows)."""


@dataclass(frozen=True)
class Growth:
    """What a new tokenizer adds to an old one."""

    sources: Sources
    """Of every id that needs a row."""
    old_ids: tuple[int, ...]
    """Ids of the old tokenizer that have a row: they keep it."""
    size: int
    """One more than the new tokenizer's highest id."""


def compare(old: Tokenizer, new: Tokenizer, rows: int, reserved: Iterable[str] = ()) -> Growth:
    """What `new` adds.

    Args:
        rows: of the old embedding; an old token beyond them counts as new.
        reserved: tokens of the new tokenizer that only fill up.

    Raises:
        ValueError: an old token has another id in the new tokenizer, or none.
    """
    before, after = _by_id(old), _by_id(new)
    if moved := [f"{token!r} ({i})" for i, token in before.items() if after.get(i) != token]:
        raise ValueError(
            f"{new.directory} is no extension of the tokenizer in {old.directory}: {len(moved)} of its {len(before)} "
            f"tokens have another id there, or none: {', '.join(moved[:5])}"
        )
    split, known, empty = _splitter(old, new), {i for i in before if i < rows}, set(reserved)
    fresh = {i: token for i, token in sorted(after.items()) if i not in known}
    sources = {
        i: () if token in empty else tuple(one for one in split(token) if one in known) for i, token in fresh.items()
    }
    return Growth(sources, tuple(sorted(known)), max(after) + 1)


def _by_id(tokenizer: Tokenizer) -> dict[int, str]:
    return {number: token for token, number in tokenizer.hf.get_vocab().items()}


def _splitter(old: Tokenizer, new: Tokenizer) -> Callable[[str], list[int]]:
    """A function from a new token to the ids of the old tokens it is made of; unknown ones are left out."""
    if not old.hf.is_fast:
        return _sentencepiece_splitter(old)
    backend = old.hf.backend_tokenizer
    settings = json.loads(backend.to_str())
    unknown = settings["model"].get("unk_token")
    spelled = _spelling(settings)
    added = {token.content for token in new.hf.added_tokens_decoder.values()} - set(old.hf.get_vocab())

    def split(token: str) -> list[int]:
        parts = backend.model.tokenize(spelled(token) if token in added else token)
        return [part.id for part in parts if part.value != unknown]

    return split


def _spelling(settings: Mapping[str, object]) -> Callable[[str], str]:
    """How a text is written in the tokens of a model; added tokens are not."""
    return spell if spells_bytes(settings) else lambda text: text.replace(" ", SPACE)


def _sentencepiece_splitter(old: Tokenizer) -> Callable[[str], list[int]]:
    model = getattr(old.hf, "sp_model", None)
    if model is None:
        kind = type(old.hf).__name__
        raise ValueError(
            f"{old.directory}: a {kind} is neither a fast tokenizer nor SentencePiece; it cannot be extended"
        )
    bare = processor(ModelProto.FromString(model.serialized_model_proto()), bare=True)
    return lambda token: [part for part in bare.encode(token) if part != bare.unk_id()]
