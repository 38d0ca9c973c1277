"""Learned merges appended to a byte-level BPE: what `megatron-patch vocab merge` does for such a base.

    args = VocabMergeArgs(base="llama3/", new="new.json", output="merged/", corpus=("corpus.jsonl",))
    report = merge_byte_level(args, open_byte_level("llama3/"))

Tokens outside the script filter, tokens that cannot be merged from others that are there and tokens that the corpus
does not use are dropped. The directory comes into being whole: `tokenizers` and transformers are compared on it before
anything gets its name. It does not know models.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from megatron_patch.checkpoint.directory import staging
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from megatron_patch.vocab.arguments import VocabMergeArgs
from megatron_patch.vocab.byte_level import (
    GPT2_FILES,
    JSON,
    ByteLevel,
    backend,
    load_merges,
    spelled,
)
from megatron_patch.vocab.byte_level_choice import Choice, words_of
from megatron_patch.vocab.corpus import Corpus, batches
from megatron_patch.vocab.fast import SETTINGS, set_class
from megatron_patch.vocab.merge_report import MergeReport, Outcome, compared_texts
from megatron_patch.vocab.note import EXTENSION, write_note

_SIDE_FILES = (SETTINGS, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")


def merge_byte_level(args: VocabMergeArgs, base: ByteLevel) -> MergeReport:
    """Writes the merged tokenizer.

    Raises ValueError for what a user can mend: merges of another base, no token left to add, documents on which
    `tokenizers` and transformers do not agree. Nothing is left behind then.
    """
    start = time.perf_counter()
    corpus = Corpus(args.corpus, args.text_key, name="vocab merge") if args.corpus else None
    choice = Choice(base, args.script)
    choice.choose(load_merges(args.new, base), args.max_new)
    words = words_of(base, corpus, cjk=args.script == "cjk") if corpus else None
    skipped = dict(corpus.skipped) if corpus else {}
    if words:
        choice.drop_unused(words, args.min_count)
    content, reserved = base.extended(choice.merges, args.pad_multiple)
    check_names(base, content, reserved)
    size = len(content["model"]["vocab"])
    with staging(args.output, args.overwrite) as staged:
        _write(base, content, staged)
        outcome = _agreeing(base, content, staged, lambda: compared_texts(corpus, args.check_documents))
        write_note(staged, EXTENSION, {"base_size": base.size, "size": size, "reserved": reserved})
    return MergeReport(
        output=args.output,
        libraries="tokenizers = transformers",
        base_size=base.size,
        vocab_size=size,
        new_pieces=len(choice.tokens),
        reserved=len(reserved),
        dropped={reason: count for reason, count in choice.dropped.items() if count},
        used=sum(map(bool, words.uses(choice.tokens).values())) if words else None,
        skipped=skipped,
        seconds=time.perf_counter() - start,
        **vars(outcome),
    )


# --------------------------------------------------------------------------------------------------- writing, comparing


def _write(base: ByteLevel, content: Mapping[str, Any], directory: Path) -> None:
    """tokenizer.json with its settings, and GPT-2's two files where the base has them; nothing stale."""
    if base.published:
        for name in _SIDE_FILES:
            if (base.directory / name).is_file():
                shutil.copyfile(base.directory / name, directory / name)
    else:
        load_tokenizer(base.directory).hf.save_pretrained(str(directory))
        set_class(directory)
    (directory / JSON).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    if base.published and all((base.directory / name).is_file() for name in GPT2_FILES):
        vocab, merges = content["model"]["vocab"], content["model"]["merges"]
        lines = ["#version: 0.2", *map(spelled, merges)]
        (directory / GPT2_FILES[0]).write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        (directory / GPT2_FILES[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _agreeing(base: ByteLevel, content: Mapping[str, Any], staged: Path, texts: Callable[[], Iterable[str]]) -> Outcome:
    """Compares the libraries; where they differ the tokenizer gets the generic class, and is compared again."""
    old, ours = load_tokenizer(base.directory), Backend.from_file(str(staged / JSON))
    ours.encode_special_tokens = True
    for _ in range(2):
        merged = load_tokenizer(staged)
        differing = _other_ids(content, merged)
        if not differing:
            outcome, differing = _compare(old, merged, ours, texts())
        if not differing:
            return outcome
        set_class(staged)
    raise ValueError(
        f"tokenizers and transformers do not agree on {base.directory}: they differ on {differing[:200]!r}"
    )


def check_names(base: ByteLevel, content: Mapping[str, Any], reserved: Iterable[str]) -> None:
    """Old tokens have their old id, and names of special tokens and reserved rows are text as they were.

    A model that takes a word for a token without merging might find a name, now that it is in its vocabulary.
    """
    written = content["model"]["vocab"]
    if moved := [token for token, number in base.vocab.items() if written.get(token) != number]:
        raise AssertionError(f"old tokens have moved: {moved[:5]}")
    names = [*base.added, *reserved]
    before, after = (one.encode_batch(names, add_special_tokens=False) for one in (base.backend(), backend(content)))
    found = [
        {name for name, one in zip(names, read, strict=True) if written[name] in one.ids} for read in (before, after)
    ]
    if wrong := sorted(found[1] - found[0]):
        raise ValueError(f"{base.directory}: its model would read names of rows in a text as those rows: {wrong[:5]}")


def _other_ids(content: Mapping[str, Any], merged: Tokenizer) -> str:
    """A token to which transformers gives another id than the file, if there is one."""
    read = merged.hf.get_vocab()
    return min(map(str, dict(read.items() ^ content["model"]["vocab"].items())), default="")


def _compare(old: Tokenizer, merged: Tokenizer, ours: Backend, texts: Iterable[str]) -> tuple[Outcome, str]:
    """Compares ids and round trips; also returns the first text on which the libraries differ."""
    outcome = Outcome()
    for batch in batches(texts):
        before, after = (one.encode_batch(batch, add_special_tokens=False) for one in (old, merged))
        expected = [one.ids for one in ours.encode_batch(batch, add_special_tokens=False)]
        for text, was, one, other in zip(batch, before, after, expected, strict=True):
            if one != other:
                return Outcome(), text
            broken = merged.decode(one) != text or ours.decode(one, skip_special_tokens=False) != text
            outcome.add(text, broken=broken and old.decode(was) == text, changed=one != was)
    return outcome, ""
