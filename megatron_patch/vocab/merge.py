"""New pieces appended to a base tokenizer: `megatron-patch vocab merge`. SentencePiece here, else `byte_level_merge`.

    report = merge(VocabMergeArgs(base="llama/", new="new.model", output="merged/", corpus=("corpus.jsonl",)))

Pieces outside the script filter, pieces that no text can reach and pieces that the corpus does not use are dropped.
The directory comes into being whole: tokenizer.json is rebuilt from the merged tokenizer.model, and both are compared
on the corpus before anything gets its name. It does not know models.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megatron_patch.checkpoint.directory import read_json, staging
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from megatron_patch.tokenizer.conventions import Recognised, recognise
from megatron_patch.tokenizer.hf import tokenizer_files
from megatron_patch.tokenizer.sentencepiece_fast import JSON, MODEL
from megatron_patch.tokenizer.sentencepiece_model import UNUSED, load_proto, processor
from megatron_patch.vocab.arguments import VocabMergeArgs
from megatron_patch.vocab.byte_level import open_byte_level
from megatron_patch.vocab.byte_level_merge import merge_byte_level
from megatron_patch.vocab.corpus import Corpus, batches
from megatron_patch.vocab.fast import SETTINGS, default_settings, save
from megatron_patch.vocab.merge_report import MergeReport, Outcome, compared_texts
from megatron_patch.vocab.note import EXTENSION, write_note
from megatron_patch.vocab.pieces import (
    extend,
    normal_pieces,
    reachable,
    require_bpe,
    supported,
)
from megatron_patch.vocab.scripts import is_cjk_piece

_ROUNDS = 8


@dataclass(frozen=True)
class Base:
    """The tokenizer that is extended."""

    proto: ModelProto
    directory: Path | None
    """Its Hugging Face directory; None where it is a file alone."""
    published: Recognised | None
    """How it is read where its class is published Python code: by sentencepiece, with no tokenizer.json."""
    added: Mapping[int, tuple[str, bool]]
    """Tokens that follow the model's own: id -> text, and whether it is special."""


def merge(args: VocabMergeArgs) -> MergeReport:
    """Writes the merged tokenizer.

    Raises ValueError for what a user can mend: a base that is no BPE, no piece left to add, documents on
    which the libraries cannot be brought to agree. Nothing is left behind then.
    """
    start = time.perf_counter()
    args.validate()
    if byte_level := open_byte_level(args.base):
        return merge_byte_level(args, byte_level)
    base = open_base(Path(args.base))
    corpus = Corpus(args.corpus, args.text_key, name="vocab merge") if args.corpus else None
    grown = extend(base.proto, (), added=base.added)
    choice = _Choice(grown, args.pad_multiple)
    choice.choose(load_proto(args.new), args)
    if corpus:
        choice.drop_unused(corpus, args.min_count)
    with staging(args.output, args.overwrite) as staged:
        outcome = _write_agreeing(base, choice, staged, args, corpus)
        proto = choice.proto()
        reserved = [one.piece for one in proto.pieces[len(base.proto.pieces) :] if one.type == UNUSED]
        write_note(staged, EXTENSION, {"base_size": len(grown.pieces), "size": len(proto.pieces), "reserved": reserved})
    return MergeReport(
        output=args.output,
        libraries="sentencepiece = transformers",
        base_size=len(grown.pieces),
        vocab_size=len(proto.pieces),
        new_pieces=len(choice.pieces),
        reserved=len(reserved),
        dropped={reason: count for reason, count in choice.dropped.items() if count},
        used=choice.used(corpus) if corpus else None,
        skipped=dict(corpus.skipped) if corpus else {},
        seconds=time.perf_counter() - start,
        **vars(outcome),
    )


# ------------------------------------------------------------------------------------------------------------ the base


def open_base(path: Path) -> Base:
    """Reads the base; ValueError if it cannot be extended."""
    if path.is_file():
        proto = load_proto(path)
        require_bpe(proto, path)
        return Base(proto, None, None, {})
    named = (path / SETTINGS).is_file()
    published = recognise(path) if named else None
    if published and (published.convention.after or published.convention.image_tokens is not None):
        raise ValueError(
            f"{path}: its special tokens stand around the SentencePiece ids, where new pieces have no room"
        )
    file = published.file if published else path / MODEL
    if not file.is_file():
        raise ValueError(f"{path} holds no {MODEL}, nor the {JSON} of a byte-level BPE")
    proto = load_proto(file)
    require_bpe(proto, file)
    return Base(proto, path if named else None, published, _added(path, len(proto.pieces)) if named else {})


def _added(path: Path, size: int) -> dict[int, tuple[str, bool]]:
    tokens = load_tokenizer(path).hf.added_tokens_decoder
    return {number: (token.content, token.special) for number, token in tokens.items() if number >= size}


# ------------------------------------------------------------------------------------------------- which pieces to take


@dataclass
class _Choice:
    """The new pieces, in order of rank, as they get fewer."""

    base: ModelProto
    pad_multiple: int
    pieces: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    def proto(self) -> ModelProto:
        return extend(self.base, self.pieces, self.pad_multiple)

    def choose(self, new: ModelProto, args: VocabMergeArgs) -> None:
        """Takes what passes the script filter and can be reached; ValueError if that is nothing."""
        known = {one.piece for one in self.base.pieces}
        self.pieces = normal_pieces(new)
        self._keep([one for one in self.pieces if one not in known], "the base has them")
        self._keep([one for one in self.pieces if args.script == "any" or is_cjk_piece(one)], "other scripts")
        self._keep(reachable(self.proto(), self.pieces), "no text reaches them")
        if args.max_new:
            self._keep(self.pieces[: args.max_new], "beyond --max-new")
            self._keep(reachable(self.proto(), self.pieces), "no text reaches them")
        if not self.pieces:
            dropped = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items())
            raise ValueError(f"{args.new} has no piece to add to {args.base} ({dropped})")

    def drop_unused(self, corpus: Corpus, min_count: int) -> None:
        """Drops pieces that the corpus uses too rarely, unless others are merged from them, until none is left."""
        known = {one.piece for one in self.base.pieces}
        for _ in range(_ROUNDS if min_count else 0):
            counts = self._counts(corpus)
            used = [piece for piece, count in zip(self.pieces, counts, strict=True) if count >= min_count]
            before = len(self.pieces)
            self._keep(supported(used, self.pieces, known), f"used less than {min_count} times")
            if len(self.pieces) == before:
                break
        if not self.pieces:
            raise ValueError(f"no new piece occurs {min_count} times in --corpus: is it text of the wanted language?")

    def drop(self, culprits: Iterable[str]) -> None:
        """Drops these, and those that can no longer be reached."""
        culprits = set(culprits)
        self._keep([one for one in self.pieces if one not in culprits], "the libraries differ on them")
        self._keep(reachable(self.proto(), self.pieces), "no text reaches them")

    def used(self, corpus: Corpus) -> int:
        """How many new pieces the corpus uses."""
        return int((self._counts(corpus) > 0).sum())

    def _counts(self, corpus: Corpus) -> np.ndarray:
        proto = self.proto()
        encode, counts = processor(proto).encode, np.zeros(len(proto.pieces), np.int64)
        for texts in batches(corpus):
            ids = np.fromiter(chain.from_iterable(encode(texts)), np.int64)
            counts += np.bincount(ids, minlength=len(counts))
        first = len(self.base.pieces)
        return counts[first : first + len(self.pieces)]

    def _keep(self, kept: list[str], reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + len(self.pieces) - len(kept)
        self.pieces = kept


# --------------------------------------------------------------------------------------------------- writing, comparing


def _write_agreeing(base: Base, choice: _Choice, staged: Path, args: VocabMergeArgs, corpus: Corpus | None) -> Outcome:
    """Writes the tokenizer; pieces on which the two libraries differ are dropped, and it is written again."""
    for _ in range(_ROUNDS):
        proto = choice.proto()
        write_tokenizer(base, proto, staged)
        merged = load_tokenizer(staged)
        outcome, culprits = _compare(base, proto, merged, compared_texts(corpus, args.check_documents))
        new = culprits & set(choice.pieces)
        if not culprits:
            _check_ids(choice.base, proto, merged)
            return outcome
        if not new:
            break
        choice.drop(new)
    raise ValueError(
        f"sentencepiece and transformers do not agree on {args.output}: they differ on text with {sorted(culprits)[:5]}"
    )


def write_tokenizer(base: Base, proto: ModelProto, directory: Path) -> None:
    """Writes tokenizer.model, and tokenizer.json with its settings; nothing of the base's vocabulary stays behind."""
    for file in directory.iterdir():
        file.unlink()
    if base.directory is not None:
        _copy_settings(base, base.directory, directory)
    if not base.published:
        settings = _json(directory / SETTINGS) or default_settings(proto)
        save(proto, {**_json(directory / "special_tokens_map.json"), **settings}, directory)
        (directory / "special_tokens_map.json").unlink(missing_ok=True)  # tokenizer_config.json says it all
    (directory / (base.published.file.name if base.published else MODEL)).write_bytes(proto.SerializeToString())


def _copy_settings(base: Base, source: Path, directory: Path) -> None:
    """The base's settings without its vocabulary: what is stale would win over the merged model."""
    stale = {JSON, MODEL} if base.published is None else {JSON, base.published.file.name}
    names = [SETTINGS, "special_tokens_map.json", "chat_template.jinja"]
    if base.published:
        names = [file.name for file in (*tokenizer_files(source), *source.glob("*.py"))]
    for name in set(names) - stale:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _compare(base: Base, proto: ModelProto, merged: Tokenizer, texts: Iterable[str]) -> tuple[Outcome, set[str]]:
    """Compares ids and round trips, and names the tokens on which the libraries differ."""
    old_sp, new_sp, outcome, culprits = processor(base.proto), processor(proto), Outcome(), set()
    for batch in batches(texts):
        ours, theirs = new_sp.encode(batch), merged.encode_batch(batch, add_special_tokens=False)
        for text, one, other, was in zip(batch, ours, theirs, old_sp.encode(batch), strict=True):
            culprits |= {proto.pieces[i].piece for i in _difference(one, other)}
            broken = new_sp.decode(one) != text or merged.decode(other) != text
            outcome.add(text, broken=broken and old_sp.decode(was) == text, changed=one != was)
    return outcome, culprits


def _difference(one: list[int], other: list[int]) -> set[int]:
    """The ids between what two lists have in common at their beginning and at their end."""
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    end = 0
    while end < min(len(one), len(other)) - start and one[-1 - end] == other[-1 - end]:
        end += 1
    return {*one[start : len(one) - end], *other[start : len(other) - end]}


def _check_ids(base: ModelProto, proto: ModelProto, merged: Tokenizer) -> None:
    """Every piece has its id in what transformers reads, the old ones their old one, and none is left over."""
    vocabulary: dict[str, Any] = merged.hf.get_vocab()
    pieces = [one.piece for one in proto.pieces]
    if pieces[: len(base.pieces)] != [one.piece for one in base.pieces]:
        raise AssertionError("an old piece has moved")
    if wrong := [piece for number, piece in enumerate(pieces) if vocabulary.get(piece) != number]:
        raise ValueError(f"transformers gives another id than {MODEL} to {len(wrong)} pieces: {wrong[:5]}")
    if merged.vocab_size != len(pieces):
        raise ValueError(f"transformers reads {merged.vocab_size} ids, {MODEL} has {len(pieces)}")
