"""A SentencePiece BPE written as a tokenizer.json that gives its ids in every version of transformers.

How its merges and spaces are written there is the matter of tokenizer.sentencepiece_fast; here special tokens and
settings are added to it. It knows no corpus and no models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer, processors

from megatron_patch.checkpoint.directory import read_json
from megatron_patch.tokenizer.sentencepiece_fast import KEPT, backend
from megatron_patch.tokenizer.sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED

SETTINGS = "tokenizer_config.json"
_CLASS = "PreTrainedTokenizerFast"
"""The class that every version of transformers reads tokenizer.json with as it stands."""
_ROLES = ("unk_token", "bos_token", "eos_token", "pad_token")


def save(proto: ModelProto, settings: Mapping[str, Any], directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
        settings: what a tokenizer_config.json of the base says: roles of tokens, add_bos_token, chat template.

    Raises:
        ValueError: the model does something that `tokenizers` cannot do.
    """
    from transformers import PreTrainedTokenizerFast

    roles = {role: _content(settings[role]) for role in _ROLES if settings.get(role) is not None}
    kept = {name: settings[name] for name in KEPT if settings.get(name) is not None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_with_specials(proto, settings, roles), clean_up_tokenization_spaces=False, **roles, **kept
    )
    tokenizer.save_pretrained(str(directory))
    set_class(directory)


def set_class(directory: Path) -> None:
    """Has transformers read a directory's tokenizer.json as it stands, whatever class of its own it names."""
    file = directory / SETTINGS
    settings = (read_json(file) if file.is_file() else {}) | {"tokenizer_class": _CLASS}
    settings.pop("auto_map", None)
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def default_settings(proto: ModelProto) -> dict[str, Any]:
    """What Llama's tokenizer_config.json says, for a model file alone."""
    ids = {role: getattr(proto.trainer_spec, f"{role.removesuffix('_token')}_id") for role in _ROLES}
    return {role: proto.pieces[number].piece for role, number in ids.items() if number >= 0}


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _with_specials(proto: ModelProto, settings: Mapping[str, Any], roles: Mapping[str, str]) -> Tokenizer:
    # In the files that were published with Llama and Mistral a space stands before each text between special tokens.
    made = backend(proto, everywhere=True)
    special = [one for one in proto.pieces if one.type in (CONTROL, UNKNOWN, USER_DEFINED)]
    made.add_tokens([AddedToken(one.piece, special=one.type != USER_DEFINED, normalized=False) for one in special])
    around = {"bos_token": settings.get("add_bos_token", True), "eos_token": settings.get("add_eos_token", False)}
    before, behind = ([roles[role]] if wanted and role in roles else [] for role, wanted in around.items())
    if before or behind:
        made.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *behind],
            pair=[*before, "$A", *behind, *(f"{token}:1" for token in before), "$B:1", *(f"{one}:1" for one in behind)],
            special_tokens=[(token, made.token_to_id(token)) for token in {*before, *behind}],
        )
    return made
