"""Byte-level BPE tokenizers (GPT-2, Llama 3, Qwen, DeepSeek): read from tokenizer.json, and extended behind their ids.

    base = open_byte_level(Path("llama3/"))                  # None where the directory holds something else
    content, reserved = base.extended([("ä¸Ń", "åĽ½")], pad_multiple=128)

Old merges stand before new ones, so no old merge ever gives way to a new one. Every id stays where it is: special
tokens are written into the model's vocabulary, for `tokenizers` numbers those that are not there on from its end.
It knows neither corpora nor models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from megatron_patch.checkpoint.directory import read_json
from megatron_patch.tokenizer import load_tokenizer
from megatron_patch.tokenizer.byte_letters import byte_of, letters
from megatron_patch.tokenizer.conventions import recognise
from megatron_patch.tokenizer.sentencepiece_model import SPACE
from megatron_patch.vocab.pieces import RESERVED
from megatron_patch.vocab.scripts import has_cjk, is_cjk_piece

JSON = "tokenizer.json"
GPT2_FILES = ("vocab.json", "merges.txt")

Merge = tuple[str, str]
"""Two tokens that become one, spelled as in tokenizer.json: a letter for each byte."""

_LONGEST = 1 << 20
_REFUSED = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
"""Options of the BPE model with which appended merges would not do what is said here."""


@dataclass(frozen=True)
class ByteLevel:
    """A byte-level BPE as its tokenizer.json says it."""

    directory: Path
    content: Mapping[str, Any]
    published: bool
    """Whether the directory has this tokenizer.json; otherwise it was made from other files."""

    @cached_property
    def model(self) -> dict[str, int]:
        """Tokens of the model itself, as `tokenizers` finds them in words."""
        return self.content["model"]["vocab"]

    @cached_property
    def added(self) -> dict[str, int]:
        """Tokens that are found in a text before it is cut into words: special ones and others."""
        return {one["content"]: self.model.get(one["content"], one["id"]) for one in self.content["added_tokens"] or ()}

    @cached_property
    def vocab(self) -> dict[str, int]:
        """All tokens."""
        return {**self.added, **self.model}

    @property
    def size(self) -> int:
        """One more than the highest id in use."""
        return max(self.vocab.values()) + 1

    @cached_property
    def digest(self) -> str:
        """Says whether two bases have the same model, whatever their special tokens."""
        own = sorted((number, token) for token, number in self.model.items() if token not in self.added)
        return hashlib.sha256(json.dumps([own, list(map(spelled, self._merges))]).encode()).hexdigest()

    @property
    def _merges(self) -> list[Any]:
        return self.content["model"]["merges"]

    def backend(self) -> Backend:
        """The tokenizer at work; special tokens that are spelled out in a text are text."""
        return backend(self.content)

    def bare(self, merges: Sequence[Merge] = ()) -> Backend:
        """The extended model alone, always merging, to ask what a token by itself is merged to."""
        content, _ = self.extended(merges)
        content["model"]["ignore_merges"] = False
        return backend(content)

    def extended(self, merges: Sequence[Merge], pad_multiple: int = 1) -> tuple[dict[str, Any], list[str]]:
        """tokenizer.json with these merges behind the old ones, and the names of the rows that only fill up.

        New tokens get their ids in the order of the merges, from `size` on. Gaps between old ids and the end up to a
        multiple become reserved rows.
        """
        vocab, reserved = {**self.model, **self.added}, []
        taken = {*vocab, *(left + right for left, right in merges)}
        names = (name for name in map(RESERVED.format, range(_LONGEST)) if name not in taken)

        def reserve(number: int) -> None:
            reserved.append(next(names))
            vocab[reserved[-1]] = number

        size = self.size
        for number in sorted(set(range(size)) - set(vocab.values())):
            reserve(number)
        for left, right in merges:
            if left + right not in vocab:
                vocab[left + right] = size
                size += 1
        for number in range(size, -(-size // pad_multiple) * pad_multiple):
            reserve(number)
        as_text = bool(self._merges) and isinstance(self._merges[0], str)
        own = [" ".join(pair) if as_text else list(pair) for pair in merges]
        model = {**self.content["model"], "vocab": vocab, "merges": [*self._merges, *own]}
        return {**self.content, "model": model}, reserved


def open_byte_level(path: str | Path) -> ByteLevel | None:
    """The byte-level BPE of a directory; None where there is none.

    Raises:
        ValueError: it is one, but cannot be read, or does something with which merges cannot be appended.
    """
    path = Path(path)
    content, published = _read(path)
    if not content or (content["model"] or {}).get("type", "BPE") != "BPE" or not spells_bytes(content):
        return None
    if refused := [name for name in _REFUSED if content["model"].get(name)]:
        raise ValueError(f"{path}: a byte-level BPE with {', '.join(refused)} cannot be extended")
    return ByteLevel(path, content, published)


def _read(path: Path) -> tuple[dict[str, Any] | None, bool]:
    """What tokenizer.json says, or what it would if there was one; and whether it is the directory's own."""
    known = recognise(path) if path.is_dir() else None
    if known is None and (path / JSON).is_file():
        return read_json(path / JSON), True
    if (known and known.convention.kind != "sentencepiece") or all((path / name).is_file() for name in GPT2_FILES):
        tokenizer = load_tokenizer(path).hf
        return (json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None), False
    return None, False


def backend(content: Mapping[str, Any]) -> Backend:
    """What `tokenizers` makes of a tokenizer.json; special tokens that are spelled out in a text are text."""
    tokenizer = Backend.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer


def spells_bytes(content: Mapping[str, Any]) -> bool:
    """Whether the tokens of a tokenizer.json have a letter for each byte."""
    return any('"ByteLevel"' in json.dumps(content.get(step)) for step in ("normalizer", "pre_tokenizer"))


def spelled(merge: Any) -> str:
    """A merge as merges.txt has it; in a tokenizer.json it is that or a pair."""
    return merge if isinstance(merge, str) else " ".join(merge)


# ---------------------------------------------------------------------------------------------------- bytes and letters


def spell(text: str) -> str:
    """A text as tokens spell it."""
    return "".join(map(letters().__getitem__, text.encode()))


def bytes_of(token: str) -> bytes | None:
    """The bytes that a token stands for; None where it is not spelled in bytes."""
    return bytes(map(byte_of().__getitem__, token)) if byte_of().keys() >= set(token) else None


def is_cjk_token(token: str) -> bool:
    """Whether only CJK text can hold a token: CJK characters, but for a space before them, whole or cut at either end.

    The beginning of a character counts where all characters that begin so are CJK. The end of one does not, for it
    says nothing, so there must be something else; it may stand before that.
    """
    data = bytes_of(token) or b""
    ends = len(data) - len(data.lstrip(bytes(range(0x80, 0xC0))))
    begun = _begun(data)
    try:
        text = data[ends : len(data) - len(begun)].decode()
    except UnicodeDecodeError:
        return False
    if ends > 3 or SPACE in text or (text.startswith(" ") and ends):
        return False
    characters = text.removeprefix(" ")
    return bool(characters or begun) and all(map(is_cjk_piece, characters)) and (not begun or _begins_cjk(begun))


def _begun(data: bytes) -> bytes:
    """The character at the end that lacks its last bytes."""
    for length in range(1, min(4, len(data) + 1)):
        lead = data[-length]
        if lead >= 0xC0:
            return data[-length:] if _length(lead) > length else b""
        if lead < 0x80:
            break
    return b""


def _length(lead: int) -> int:
    """Bytes of the character that begins with this one."""
    return 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


@cache
def _begins_cjk(begun: bytes) -> bool:
    length = _length(begun[0])
    code = begun[0] & (0x7F >> length)
    for byte in begun[1:]:
        code = code << 6 | byte & 0x3F
    missing = 6 * (length - len(begun))
    return all(has_cjk(chr(one)) for one in range(code << missing, min(code + 1 << missing, 0x110000)))


# ----------------------------------------------------------------------------------------------------- a list of merges

_FORMAT = "byte-level merges"


def dump_merges(base: ByteLevel, merges: Sequence[Merge]) -> str:
    """A file of merges that continue those of `base`, the first ones first."""
    return json.dumps({"format": _FORMAT, "base": base.digest, "merges": merges}, ensure_ascii=False, indent=0) + "\n"


def load_merges(path: str | Path, base: ByteLevel) -> list[Merge]:
    """Reads such a file; a ValueError names it where it is none, or continues another base."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        merges = [(left, right) for left, right in content["merges"]] if content["format"] == _FORMAT else None
    except (ValueError, KeyError, TypeError):
        merges = None
    if merges is None:
        raise ValueError(
            f"{path} is no list of merges; a byte-level base is continued by what "
            f"`vocab train --base {base.directory}` writes"
        )
    if content["base"] != base.digest:
        raise ValueError(f"{path} continues the merges of another tokenizer than {base.directory}")
    return merges
