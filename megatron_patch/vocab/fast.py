"""A SentencePiece BPE as a transformers tokenizer that gives its ids exactly.

transformers 5 orders the merges of a tokenizer.model by id and puts no space before a text that begins with one. Both
change ids of real models: Llama's and Mistral's pieces of several spaces have low ids and the lowest of scores. Here
merges are ordered by score, and the space is put as sentencepiece puts it, which is what the tokenizer.json files that
were published with those models do. It knows no corpus and no models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from megatron_patch.vocab.pieces import CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from megatron_patch.vocab.scripts import SPACE

CLASS = "PreTrainedTokenizerFast"
"""The class that every version of transformers reads tokenizer.json with as it stands."""
_ROLES = ("unk_token", "bos_token", "eos_token", "pad_token")
_KEPT = ("chat_template", "model_max_length", "padding_side", "truncation_side", "model_input_names")


def save(proto: ModelProto, settings: Mapping[str, Any], directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
        settings: what a tokenizer_config.json of the base says: roles of tokens, add_bos_token, chat template.

    Raises:
        ValueError: the model does something that `tokenizers` cannot do.
    """
    from transformers import PreTrainedTokenizerFast

    roles = {role: _content(settings[role]) for role in _ROLES if settings.get(role) is not None}
    kept = {name: settings[name] for name in _KEPT if settings.get(name) is not None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(proto, settings, roles), clean_up_tokenization_spaces=False, **roles, **kept
    )
    tokenizer.save_pretrained(str(directory))
    file = directory / "tokenizer_config.json"
    written = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": CLASS}
    file.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def default_settings(proto: ModelProto) -> dict[str, Any]:
    """What Llama's tokenizer_config.json says, for a model file alone."""
    ids = {role: getattr(proto.trainer_spec, f"{role.removesuffix('_token')}_id") for role in _ROLES}
    return {role: proto.pieces[number].piece for role, number in ids.items() if number >= 0}


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _backend(proto: ModelProto, settings: Mapping[str, Any], roles: Mapping[str, str]) -> Tokenizer:
    spec = proto.trainer_spec
    backend = Tokenizer(
        models.BPE(
            vocab={one.piece: number for number, one in enumerate(proto.pieces)},
            merges=merges(proto),
            unk_token=next(one.piece for one in proto.pieces if one.type == UNKNOWN),
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    )
    backend.normalizer, backend.decoder = _normalizer(proto), _decoder(proto)
    special = [one for one in proto.pieces if one.type in (CONTROL, UNKNOWN, USER_DEFINED)]
    backend.add_tokens([AddedToken(one.piece, special=one.type != USER_DEFINED, normalized=False) for one in special])
    around = {"bos_token": settings.get("add_bos_token", True), "eos_token": settings.get("add_eos_token", False)}
    before, behind = ([roles[role]] if wanted and role in roles else [] for role, wanted in around.items())
    if before or behind:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *behind],
            pair=[*before, "$A", *behind, *(f"{token}:1" for token in before), "$B:1", *(f"{one}:1" for one in behind)],
            special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *behind}],
        )
    return backend


def merges(proto: ModelProto) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the piece of the highest score first, as sentencepiece takes them."""
    scores = {one.piece: one.score for one in proto.pieces if one.type in (NORMAL, USER_DEFINED)}
    pairs = [pair for piece in scores for pair in _halves(piece, scores)]
    return sorted(pairs, key=lambda pair: -scores["".join(pair)])


def _halves(piece: str, known: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
    return (pair for pair in halves if pair[0] in known and pair[1] in known)


def _normalizer(proto: ModelProto) -> normalizers.Normalizer:
    spec = proto.normalizer_spec
    if proto.trainer_spec.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise ValueError("a SentencePiece model with spaces behind words, or as they are, has no tokenizer.json")
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(proto: ModelProto) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else steps)
