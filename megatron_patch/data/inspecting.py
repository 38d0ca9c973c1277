"""What an indexed dataset holds: `megatron-patch inspect`.

    report = inspect(InspectArgs(data_path="corpus_text_document", tokenizer_model="model/"))

Sizes and lengths come from the index alone, at once for any size of data. With a tokenizer every token is read: which
special tokens there are and where, and how many tokens a character takes, by decoding some documents.
It judges nothing: that is `verify-data`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from megatron_patch.data.index_file import IndexFile, open_index, structure_problems
from megatron_patch.data.scanning import read_tokens, token_blocks
from megatron_patch.data.tool_arguments import InspectArgs
from megatron_patch.progress import Progress
from megatron_patch.tokenizer import Tokenizer, load_tokenizer

MAX_DECODED = 1 << 16
"""Tokens of one document that are decoded at most."""


@dataclass(frozen=True)
class Lengths:
    """How long documents are, in tokens."""

    minimum: int
    """The shortest."""
    median: float
    """Half of them are shorter."""
    mean: float
    """The average."""
    percentile_99: float
    """One in a hundred is longer."""
    maximum: int
    """The longest."""
    histogram: tuple[tuple[int, int, int, int], ...]
    """From, to (inclusive), documents, tokens; empty documents first, then a row for each power of two."""


@dataclass(frozen=True)
class SpecialToken:
    """How often a special token is in the data. Elsewhere than at an edge of a document it has most likely leaked."""

    id: int
    """Its id."""
    token: str
    """How it is spelled."""
    at_start: int
    """Documents that begin with it, and go on."""
    at_end: int
    """Documents that end with it."""
    elsewhere: int
    """All its other places."""


@dataclass(frozen=True)
class Compression:
    """Tokens beside characters, over documents drawn at random; special tokens do not count."""

    documents: int
    """Documents that were decoded, each up to its first 65,536 tokens."""
    tokens: int
    """Their tokens."""
    characters: int
    """The characters that these stand for."""
    tokens_per_character: float
    """The fewer the better."""


@dataclass(frozen=True)
class Document:
    """One document."""

    number: int
    """Its number, from 0."""
    tokens: int
    """Its length."""
    offset: int
    """The byte of the .bin file at which it starts."""
    ids: tuple[int, ...]
    """Its ids, up to 65,536 of them."""
    text: str | None
    """What they read like, special tokens included, with a tokenizer."""


@dataclass(frozen=True)
class InspectReport:
    """What a dataset holds."""

    prefix: str
    """The dataset."""
    documents: int
    """Number of documents."""
    sequences: int
    """Number of sequences: as many, unless documents were split."""
    tokens: int
    """Number of tokens."""
    dtype: str
    """Type of a stored id."""
    nbytes: int
    """Size of the .bin and .idx files."""
    lengths: Lengths
    """Lengths of documents."""
    ids_outside: int | None
    """Tokens whose id the tokenizer does not have; None without a tokenizer."""
    special: tuple[SpecialToken, ...]
    """The special tokens that occur, with a tokenizer."""
    compression: Compression | None
    """Tokens per character, with a tokenizer."""
    shown: tuple[Document, ...]
    """The documents asked for."""


def inspect(args: InspectArgs) -> InspectReport:
    """Looks at a dataset. Raises ValueError if it is damaged, or if there is no document of a number asked for."""
    args.validate()
    index = open_index(args.prefix)
    problem = next(structure_problems(index), None)
    if problem is not None:
        raise ValueError(f"{problem} (`megatron-patch verify-data` lists all that is wrong)")
    beyond = [number for number in args.doc if number >= index.num_documents]
    if beyond:
        raise ValueError(f"--doc {beyond[0]}: the documents are 0..{index.num_documents - 1}")
    tokenizer = load_tokenizer(args.tokenizer_model, args.trust_remote_code) if args.tokenizer_model else None
    bounds = index.bounds()
    outside, special = special_tokens(index, bounds, tokenizer) if tokenizer else (None, ())
    return InspectReport(
        prefix=args.prefix,
        documents=index.num_documents,
        sequences=index.num_sequences,
        tokens=index.num_tokens,
        dtype=index.dtype.name,
        nbytes=sum(os.path.getsize(f"{args.prefix}{suffix}") for suffix in (".bin", ".idx")),
        lengths=length_statistics(np.diff(bounds)),
        ids_outside=outside,
        special=special,
        compression=_compression(index, bounds, tokenizer, args) if tokenizer else None,
        shown=tuple(_document(index, bounds, number, tokenizer) for number in args.doc),
    )


def length_statistics(lengths: np.ndarray) -> Lengths:
    """Figures about the lengths of documents."""
    # frexp: the exponent e of a length in 2**(e-1) .. 2**e - 1, and 0 of 0; exact up to 2**53.
    exponents = np.frexp(lengths.astype(np.float64))[1]
    documents = np.bincount(exponents)
    # As integers: bincount's own weights are floats.
    tokens = [int(lengths[exponents == exponent].sum()) for exponent in range(len(documents))]
    histogram = tuple(
        (1 << exponent >> 1, max(0, (1 << exponent) - 1), int(count), tokens[exponent])
        for exponent, count in enumerate(documents)
        if count or exponent
    )
    median, percentile = np.percentile(lengths, [50, 99])
    extremes = (int(lengths.min()), float(median), float(lengths.mean()), float(percentile), int(lengths.max()))
    return Lengths(*extremes, histogram)


# ------------------------------------------------------------------------------------------------------- special tokens


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that stand for no text."""
    added = {id for id, token in tokenizer.hf.added_tokens_decoder.items() if token.special}
    return sorted(added | set(tokenizer.hf.all_special_ids))


def special_tokens(index: IndexFile, bounds: np.ndarray, tokenizer: Tokenizer) -> tuple[int, tuple[SpecialToken, ...]]:
    """How many ids the tokenizer does not have, and how often each special token is where."""
    ids = special_ids(tokenizer)
    columns = np.full(tokenizer.vocab_size, -1, np.int64)
    columns[ids] = np.arange(len(ids))
    # Rows: at a document's start, at its end, anywhere.
    counts = np.zeros((3, len(ids)), np.int64)
    lengths = np.diff(bounds)
    # The only token of a document counts as its end.
    starts, ends = bounds[:-1][lengths > 1], bounds[1:][lengths > 0] - 1
    outside = 0
    with Progress("inspect", index.num_tokens * index.dtype.itemsize, "B") as progress:
        for first, block in token_blocks(index, progress):
            inside = (block >= 0) & (block < tokenizer.vocab_size)
            outside += block.size - int(inside.sum())
            column = columns[np.where(inside, block, 0)]
            column[~inside] = -1
            for row, places in enumerate((starts, ends)):
                here = places[slice(*np.searchsorted(places, [first, first + block.size]))]
                counts[row] += _counted(column[here - first], len(ids))
            counts[2] += _counted(column, len(ids))
    names = tokenizer.hf.convert_ids_to_tokens(ids)
    return outside, tuple(_special(ids[i], names[i], counts[:, i]) for i in np.flatnonzero(counts[2]))


def _counted(columns: np.ndarray, width: int) -> np.ndarray:
    return np.bincount(columns[columns >= 0], minlength=width)


def _special(id: int, name: str, counts: np.ndarray) -> SpecialToken:
    start, end, all_places = map(int, counts)
    return SpecialToken(id, name, start, end, all_places - start - end)


# ----------------------------------------------------------------------------------------------------------------- text


def draw(index: IndexFile, samples: int, seed: int) -> list[int]:
    """Numbers of documents drawn at random, in order."""
    generator = np.random.default_rng(seed)
    count = min(samples, index.num_documents)
    return sorted(map(int, generator.choice(index.num_documents, count, replace=False, shuffle=False)))


def known(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The ids that the tokenizer has: its decoder fails on others, or drops them."""
    return ids[(ids >= 0) & (ids < tokenizer.vocab_size)]


def _compression(index: IndexFile, bounds: np.ndarray, tokenizer: Tokenizer, args: InspectArgs) -> Compression:
    tokens = characters = 0
    numbers, special = draw(index, args.samples, args.seed), special_ids(tokenizer)
    for number in numbers:
        ids = known(_ids(index, bounds, number), tokenizer)
        ids = ids[~np.isin(ids, special)]
        tokens += ids.size
        characters += len(tokenizer.decode(ids.tolist()))
    return Compression(len(numbers), tokens, characters, tokens / max(1, characters))


def _ids(index: IndexFile, bounds: np.ndarray, number: int) -> np.ndarray:
    begin, end = map(int, bounds[number : number + 2])
    return read_tokens(index, begin, min(end, begin + MAX_DECODED))


def _document(index: IndexFile, bounds: np.ndarray, number: int, tokenizer: Tokenizer | None) -> Document:
    ids = _ids(index, bounds, number)
    text = tokenizer.decode(known(ids, tokenizer).tolist()) if tokenizer else None
    begin, end = map(int, bounds[number : number + 2])
    return Document(number, end - begin, begin * index.dtype.itemsize, tuple(ids.tolist()), text)
