"""Tokenizers built from vocabulary files alone, with the ids of the Python classes that they were published with.

A SentencePiece file is read by the `sentencepiece` library, as the published classes do: a translation to `tokenizers`
would have to repeat its normalisation and its order of merges, and be wrong where it does not. A byte-level BPE
(tiktoken's or GPT-2's) becomes a fast tokenizer: of all ways to halve a token only one is ever met, so listing all of
them by the rank of the whole gives tiktoken's result.

Like the published ChatGLM2, it gives a SentencePiece piece that is called like a special token that token's id.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from megatron_patch.tokenizer.conventions import Convention, Recognised

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_BLANKS = 80


def build(source: Recognised) -> Any:
    """The transformers tokenizer of a directory; ValueError if its files do not hold what the convention wants."""
    return _sentencepiece(source) if source.convention.kind == "sentencepiece" else _byte_bpe(source)


@dataclass(frozen=True)
class Specials:
    """The special tokens of a directory."""

    tokens: dict[int, AddedToken]
    options: dict[str, Any]
    """Roles and chat template, as transformers' constructors take them."""
    prefix: list[str]
    suffix: list[str]

    def ids(self, tokens: Iterable[str]) -> list[int]:
        by_content = {token.content: number for number, token in self.tokens.items()}
        return [by_content[token] for token in tokens]


def _specials(source: Recognised, size: int, vocabulary: Mapping[str, int]) -> Specials:
    """size: the first id that follows the vocabulary."""
    settings, convention = source.settings, source.convention
    named = {role: settings.get(role, convention.roles.get(role)) for role in _ROLES}
    roles = {role: _content(token) for role, token in named.items() if token is not None}
    before = [one for one in convention.prefix if one != "bos_token" or settings.get("add_bos_token", True)]
    behind = [*convention.suffix, *(["eos_token"] if settings.get("add_eos_token") else [])]
    prefix, suffix = ([roles.get(one, one) for one in side] for side in (before, behind))

    listed = [*named.values(), *settings.get("additional_special_tokens", ())]
    listed += settings.get("added_tokens_decoder", {}).values()
    spelled = {_content(token): token for token in (*prefix, *suffix, *listed) if token is not None}
    ids = {token: size + i for i, token in enumerate(convention.after)} | dict(source.added)
    ids |= {token: _found(token, vocabulary, source) for token in spelled if token not in ids}
    tokens = {number: _added_token(spelled.get(token, token)) for token, number in ids.items()}
    options = roles | {"chat_template": settings.get("chat_template"), "clean_up_tokenization_spaces": False}
    return Specials(tokens, options, prefix, suffix)


def _found(token: str, vocabulary: Mapping[str, int], source: Recognised) -> int:
    if token not in vocabulary:
        raise ValueError(
            f"special token {token!r} has no id: neither {source.file.name} nor added_tokens.json holds it"
        )
    return vocabulary[token]


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _added_token(token: str | Mapping[str, Any]) -> AddedToken:
    flags = {} if isinstance(token, str) else {key: bool(token.get(key)) for key in ("lstrip", "rstrip", "single_word")}
    return AddedToken(_content(token), special=True, normalized=False, **flags)


class PublishedSentencePiece(SentencePieceBackend):
    """A SentencePiece model with special tokens after it, and ChatGLM-6B's image tokens and blanks where it has them.

    Special tokens that are plain words (ChatGLM2's "sop") are not looked for inside a text, not even in prompts:
    "philosophy" holds one. Standing alone between other special tokens they are read.
    """

    def __init__(self, file: Path, image_tokens: int | None, specials: Specials) -> None:
        self._offset, self._spells_blanks = image_tokens or 0, image_tokens is not None
        super().__init__(
            vocab_file=str(file),
            added_tokens_decoder=specials.tokens,
            special_tokens_pattern="prefix_suffix",
            **specials.options,
        )
        self.prefix_tokens, self.suffix_tokens = specials.ids(specials.prefix), specials.ids(specials.suffix)

    @property
    def vocab_size(self) -> int:
        return self.sp_model.get_piece_size() + self._offset

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        for token in (*self._added_tokens_encoder, *(unique_no_split_tokens or ())):
            if not token.isalpha():
                self.tokens_trie.add(token)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp_model.encode(_spell_blanks(text) if self._spells_blanks else text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token) + self._offset

    def _convert_id_to_token(self, index: int) -> str:
        return f"<image_{index}>" if index < self._offset else self.sp_model.id_to_piece(index - self._offset)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text, run = "", []
        for token in tokens:
            if token in self._added_tokens_encoder:
                text, run = text + self.sp_model.decode(run) + token, []
            else:
                run.append(token)
        text += self.sp_model.decode(run)
        return _unspell_blanks(text) if self._spells_blanks else text


def _spell_blanks(text: str) -> str:
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    return re.sub(f" {{2,{_MAX_BLANKS}}}", lambda run: f"<|blank_{len(run[0])}|>", text)


def _unspell_blanks(text: str) -> str:
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    return re.sub(r"<\|blank_(\d{1,2})\|>", lambda token: " " * int(token[1]), text)


def _sentencepiece(source: Recognised) -> PublishedSentencePiece:
    image_tokens = source.convention.image_tokens
    if image_tokens is not None:
        image_tokens = source.settings.get("num_image_tokens", image_tokens)
    offset, processor = image_tokens or 0, SentencePieceProcessor(model_file=str(source.file))
    pieces = {processor.id_to_piece(i): i + offset for i in range(processor.get_piece_size())}
    return PublishedSentencePiece(
        source.file, image_tokens, _specials(source, offset + processor.get_piece_size(), pieces)
    )


def _byte_bpe(source: Recognised) -> PreTrainedTokenizerFast:
    convention = source.convention
    vocab, merges = (_merges_files if convention.kind == "merges" else _tiktoken_file)(source.file)
    # tiktoken takes a word that is a token as it is; GPT-2's own tokenizer always merges.
    backend = Backend(models.BPE(vocab, merges, ignore_merges=convention.kind == "tiktoken"))
    backend.pre_tokenizer = _pre_tokenizer(convention)
    backend.decoder = decoders.ByteLevel()
    if convention.nfc:
        backend.normalizer = normalizers.NFC()
    specials = _specials(source, max(vocab.values()) + 1, vocab)
    _add(backend, specials)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials.options)


def _add(backend: Backend, specials: Specials) -> None:
    backend.add_special_tokens([token for _, token in sorted(specials.tokens.items())])
    for number, token in specials.tokens.items():
        if backend.token_to_id(token.content) != number:  # `tokenizers` numbers on from the vocabulary, without gaps
            raise ValueError(f"special token {token.content!r} has id {number}, which does not follow the vocabulary")
    around = [*specials.prefix, *specials.suffix]
    backend.post_processor = processors.TemplateProcessing(
        single=[*specials.prefix, "$A", *specials.suffix],
        special_tokens=list(zip(around, specials.ids(around), strict=True)),
    )


def _pre_tokenizer(convention: Convention) -> pre_tokenizers.PreTokenizer:
    if convention.kind == "merges":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = pre_tokenizers.Split(Regex(convention.split), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _merges_files(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    lines = (file.parent / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = (tuple(line.split()) for line in lines if line and not line.startswith("#version"))
    return json.loads(file.read_text(encoding="utf-8")), list(merges)


def _tiktoken_file(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges from lines of a token in base64 and its rank, which is its id."""
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letters = bytes_to_unicode()
    names = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return {names[token]: rank for token, rank in ranks.items()}, merges
