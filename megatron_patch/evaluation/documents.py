"""What is scored: the documents of text files or of indexed data, as token ids with what they are as text.

It knows a tokenizer and files; no model and no command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_patch.data.index_file import open_index, structure_problems
from megatron_patch.data.scanning import read_tokens
from megatron_patch.tokenizer import Tokenizer
from megatron_patch.vocab.corpus import Corpus, batches


@dataclass(frozen=True)
class Reading:
    """How documents are read."""

    tokenizer: Tokenizer
    begin: tuple[int, ...]
    """What the first token of a document is given; see `beginning`."""
    append_eod: bool = False
    """Whether each ends with the end-of-document token."""
    limit: int | None = None
    """Most documents of one dataset."""
    text_key: str = "text"


@dataclass(frozen=True)
class Document:
    """One document."""

    ids: np.ndarray
    """Its tokens, all of which are scored: without what begins it."""
    characters: int
    """Of its text."""
    bytes: int
    """Of its text in UTF-8."""


@dataclass(frozen=True)
class Dataset:
    """The documents of one name on the command line."""

    name: str
    documents: tuple[Document, ...]
    left_out: tuple[tuple[str, int], ...]
    """Why and how many documents were not read or have no token."""

    @property
    def max_id(self) -> int:
        """The largest id."""
        return max(int(document.ids.max()) for document in self.documents)


def beginning(tokenizer: Tokenizer, kind: Literal["auto", "bos", "eod"] = "auto") -> tuple[int, ...]:
    """What the first token of a document is given.

    auto is what the tokenizer itself puts before a text (Llama's <s>, ChatGLM's [gMASK] sop); where that is nothing,
    its BOS token, and where it has none, the end-of-document token: as EleutherAI's lm-evaluation-harness has it.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    if kind == "auto":
        if own := own_beginning(tokenizer):
            return own
        kind = "eod" if tokenizer.bos is None else "bos"
    token = tokenizer.bos if kind == "bos" else tokenizer.eod
    if token is None:
        raise ValueError(f"--begin-with {kind}: the tokenizer in {tokenizer.directory!r} has no such token")
    return (token,)


def own_beginning(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text, if anything."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    starts = (n for n in range(len(whole) - len(plain) + 1) if whole[n : n + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)])


def read_text(name: str, reading: Reading) -> Dataset:
    """The documents of a file, a directory or a glob; ValueError if there is none."""
    corpus, found = Corpus([name], reading.text_key, reading.limit or 0), []
    for texts in batches(corpus):
        encoded = reading.tokenizer.encode_batch(texts, add_special_tokens=False)
        sizes = ((len(text), len(text.encode())) for text in texts)
        found += [
            Document(_bare(np.array(ids, np.int32), reading), *size) for ids, size in zip(encoded, sizes, strict=True)
        ]
    return _dataset(name, found, dict(corpus.skipped))


def read_indexed(prefix: str, reading: Reading) -> Dataset:
    """The documents of an indexed dataset; their text is what the tokenizer makes of the ids.

    Raises:
        ValueError: the dataset is damaged.
    """
    return _dataset(prefix, list(_indexed(prefix, reading)), {})


def _indexed(prefix: str, reading: Reading) -> Iterator[Document]:
    index = open_index(prefix)
    if problem := next(structure_problems(index), None):
        raise ValueError(f"{problem} (`megatron-patch verify-data` lists all that is wrong)")
    bounds = index.bounds()
    for number in range(min(index.num_documents, reading.limit or index.num_documents)):
        ids = _bare(read_tokens(index, *bounds[number : number + 2]).astype(np.int32), reading)
        outside = ids[(ids < 0) | (ids >= reading.tokenizer.vocab_size)]
        if outside.size:
            last = reading.tokenizer.vocab_size - 1
            raise ValueError(
                f"document {number} of {prefix}: id {outside[0]} is not the tokenizer's, which has 0..{last}"
            )
        text = reading.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        yield Document(ids, len(text), len(text.encode(errors="replace")))


def _bare(ids: np.ndarray, reading: Reading) -> np.ndarray:
    """A document without what begins it, and with the token that ends it only where that is wanted."""
    begin, eod = reading.begin, reading.tokenizer.eod
    if ids[: len(begin)].tolist() == list(begin):
        ids = ids[len(begin) :]
    if eod is not None and ids.size and ids[-1] == eod:
        ids = ids[:-1]
    if reading.append_eod and ids.size:
        if eod is None:
            raise ValueError(f"--append-eod: the tokenizer in {reading.tokenizer.directory!r} has no such token")
        ids = np.append(ids, eod)
    return ids


def _dataset(name: str, found: list[Document], left_out: dict[str, int]) -> Dataset:
    full = tuple(document for document in found if document.ids.size)
    if not full:
        raise ValueError(f"{name} has no document with a token to score")
    if len(full) < len(found):
        left_out = {**left_out, "no token": len(found) - len(full)}
    return Dataset(name, full, tuple(left_out.items()))
