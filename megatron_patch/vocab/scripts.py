"""Which characters belong to which writing system, as far as vocabulary extension asks.

It knows Unicode's blocks and SentencePiece's sign for a space: no tokenizers.
"""

from __future__ import annotations

import re

from megatron_patch.tokenizer.sentencepiece_model import SPACE

_HAN = "\u2e80-\u2fdf\u3005\u3007\u3021-\u3029\u31c0-\u31ef\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_HANGUL = "\u1100-\u11ff\u3130-\u318f\uac00-\ud7ff\uffa0-\uffdc"
# Punctuation, bopomofo, enclosed and squared characters, compatibility and full-width forms.
_SHARED = "\u2ff0-\u303f\u3100-\u312f\u3190-\u31bf\u3200-\u33ff\ufe30-\ufe4f\uff00-\uffef"

_PIECE = re.compile(f"{SPACE}?[{_HAN}{_KANA}{_HANGUL}{_SHARED}]+")
_ANY = re.compile(f"[{_HAN}{_KANA}{_HANGUL}{_SHARED}]")
_LETTERS = {"ja": re.compile(f"[{_KANA}]"), "ko": re.compile(f"[{_HANGUL}]"), "zh": re.compile(f"[{_HAN}]")}
_SHARE = {"ja": 0.1, "ko": 0.1, "zh": 0.1}
"""The part of a text's characters that decides for a language, asked in this order: Japanese has Han as well."""


def is_cjk_piece(piece: str) -> bool:
    """Whether a piece is CJK characters alone, but for a space before them."""
    return _PIECE.fullmatch(piece) is not None


def has_cjk(text: str) -> bool:
    """Whether a text has any character that a CJK piece may hold."""
    return _ANY.search(text) is not None


def language(text: str) -> str:
    """ja, ko or zh by the characters of a text, and other where there are few of those."""
    for name, letters in _LETTERS.items():
        if len(letters.findall(text)) >= _SHARE[name] * max(1, len("".join(text.split()))):
            return name
    return "other"
