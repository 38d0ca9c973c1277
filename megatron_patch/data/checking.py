"""Is an indexed dataset sound: `megatron-patch verify-data`.

    report = check(VerifyDataArgs(data_path="corpus_text_document", tokenizer_model="model/"))
    report.problems  # each with the document and the byte

First the index in itself and beside the .bin file, from which core would silently read what it finds; then, if that
holds, every token: ids below the vocabulary's size, the end-of-document token where it belongs. At last some documents
are decoded and encoded again, for a person to look at. It does not know the text that the data were made from.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from megatron_patch.data.index_file import IndexFile, Problem, open_index, structure_problems
from megatron_patch.data.indexed import IndexInfo
from megatron_patch.data.inspecting import MAX_DECODED, draw, known
from megatron_patch.data.manifest import check_fit, manifest_path
from megatron_patch.data.scanning import read_tokens, token_blocks
from megatron_patch.data.tool_arguments import VerifyDataArgs
from megatron_patch.progress import Progress
from megatron_patch.tokenizer import Tokenizer, load_tokenizer

_NO_END = "the document ends with id"


@dataclass(frozen=True)
class Sample:
    """A document that was decoded."""

    document: int
    """Its number, from 0."""
    tokens: int
    """Its length."""
    text: str
    """What it reads like, without special tokens; of a very long document the beginning."""
    same_again: bool | None
    """Whether this text has these ids again; None where only a beginning was decoded."""


@dataclass(frozen=True)
class CheckReport:
    """What was checked, and what is wrong."""

    prefix: str
    """The dataset."""
    documents: int
    """Number of documents, as the index has it; 0 if that cannot be read."""
    tokens: int
    """Number of tokens, likewise."""
    checked: tuple[str, ...]
    """What was looked at."""
    problems: tuple[Problem, ...]
    """What is wrong, in order of the files."""
    stopped: bool
    """Whether there may be more: --max-problems was reached, or the index is so wrong that no token was read."""
    samples: tuple[Sample, ...]
    """The documents that were decoded."""
    notes: tuple[str, ...]
    """What is not wrong but worth knowing."""
    seconds: float
    """Wall time."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def check(args: VerifyDataArgs) -> CheckReport:
    """Checks a dataset. Raises ValueError for wrong arguments only: what is wrong with the data is in the report."""
    start = time.perf_counter()
    args.validate()
    tokenizer = load_tokenizer(args.tokenizer_model, args.trust_remote_code) if args.tokenizer_model else None
    wanted = _Wanted.of(args, tokenizer)
    try:
        index = open_index(args.prefix)
    except ValueError as error:
        problem = Problem(str(error), f"{args.prefix}.idx", None, 0)
        return CheckReport(args.prefix, 0, 0, ("index",), (problem,), True, (), (), time.perf_counter() - start)
    checked = ["index", "sizes"]
    problems = _first(structure_problems(index), args.max_problems)
    sound = not problems
    if sound:
        checked += wanted.describe()
        problems = _first(_content_problems(index, wanted, tokenizer), args.max_problems)
    samples = _samples(index, tokenizer, args) if sound and tokenizer else ()
    return CheckReport(
        prefix=args.prefix,
        documents=index.num_documents,
        tokens=index.num_tokens,
        checked=tuple(checked),
        problems=tuple(problems),
        stopped=not sound or len(problems) == args.max_problems,
        samples=samples,
        notes=tuple(_notes(index, problems, samples, wanted, args)) if sound else ("no token was read",),
        seconds=time.perf_counter() - start,
    )


def _first(problems: Iterator[Problem], count: int) -> list[Problem]:
    return list(islice(problems, count))


@dataclass(frozen=True)
class _Wanted:
    """What every token must comply with."""

    vocab_size: int | None
    """Ids are below it; None: any."""
    eod: int | None
    """The end-of-document token; None: not looked for."""
    at_ends: bool
    """Whether each document ends with it; otherwise it is nowhere."""

    @classmethod
    def of(cls, args: VerifyDataArgs, tokenizer: Tokenizer | None) -> _Wanted:
        vocab_size = args.vocab_size or (tokenizer.vocab_size if tokenizer else None)
        if tokenizer and tokenizer.eod is None and args.eod != "any":
            raise ValueError(
                f"--eod {args.eod}: the tokenizer in {tokenizer.directory!r} has no end-of-sequence token; "
                "give --eod any"
            )
        eod = tokenizer.eod if tokenizer and args.eod != "any" else None
        return cls(vocab_size, eod, args.eod == "each")

    def describe(self) -> list[str]:
        """What is looked at, in words."""
        ids = "ids not negative" if self.vocab_size is None else f"ids below {self.vocab_size}"
        if self.eod is None:
            return [ids]
        return [ids, f"{self.eod} at each document's end only" if self.at_ends else f"no {self.eod} anywhere"]


# --------------------------------------------------------------------------------------------------------------- tokens


def _content_problems(index: IndexFile, wanted: _Wanted, tokenizer: Tokenizer | None) -> Iterator[Problem]:
    if tokenizer is not None:
        yield from _tokenizer_problems(index, tokenizer)
    bounds = index.bounds()
    full = np.diff(bounds) > 0
    ends = bounds[1:][full] - 1
    if wanted.at_ends and wanted.eod is not None:
        for document in map(int, np.flatnonzero(~full)):
            offset = int(bounds[document]) * index.dtype.itemsize
            message = f"the document is empty, it has not even the end-of-document token {wanted.eod}"
            yield Problem(message, f"{index.prefix}.bin", document, offset)
    with Progress("verify-data", index.num_tokens * index.dtype.itemsize, "B") as progress:
        for first, block in token_blocks(index, progress):
            here = ends[slice(*np.searchsorted(ends, [first, first + block.size]))] - first
            for place, complaint in sorted([*_bad_ids(block, wanted), *_bad_ends(block, here, wanted)]):
                document = int(np.searchsorted(bounds, first + place, "right")) - 1
                offset = (first + place) * index.dtype.itemsize
                token = f"token {first + place - int(bounds[document])} of the document: "
                yield Problem(token + complaint, f"{index.prefix}.bin", document, offset)


def _tokenizer_problems(index: IndexFile, tokenizer: Tokenizer) -> Iterator[Problem]:
    path = str(manifest_path(index.prefix))
    try:
        # Ids are compared one by one below, hence no vocabulary's size here.
        fit = check_fit(index.prefix, IndexInfo(index.dtype, index.lengths), tokenizer, vocab_size=None)
    except ValueError as error:
        yield Problem(str(error), path)
        return
    yield from (Problem(problem, path) for problem in fit.problems)


def _bad_ids(block: np.ndarray, wanted: _Wanted) -> Iterator[tuple[int, str]]:
    """Places in the block, and what is wrong with the id there."""
    bad = block < 0
    if wanted.vocab_size is not None:
        bad |= block >= wanted.vocab_size
    rule = "is negative" if wanted.vocab_size is None else f"is not in 0..{wanted.vocab_size - 1}"
    return ((int(place), f"id {block[place]} {rule}") for place in np.flatnonzero(bad))


def _bad_ends(block: np.ndarray, ends: np.ndarray, wanted: _Wanted) -> Iterator[tuple[int, str]]:
    """Places in the block, and what is wrong with the end-of-document token there; `ends` are the documents' last."""
    if wanted.eod is None:
        return
    found = np.flatnonzero(block == wanted.eod)
    if not wanted.at_ends:
        yield from ((int(place), f"the end-of-document token {wanted.eod} is in the data") for place in found)
        return
    for place in np.setdiff1d(found, ends, assume_unique=True):
        yield int(place), f"the end-of-document token {wanted.eod} before the document's end"
    for place in ends[block[ends] != wanted.eod]:
        yield int(place), f"{_NO_END} {block[place]}, not with {wanted.eod}"


# -------------------------------------------------------------------------------------------------------------- samples


def _samples(index: IndexFile, tokenizer: Tokenizer, args: VerifyDataArgs) -> tuple[Sample, ...]:
    bounds = index.bounds()
    return tuple(_sample(index, bounds, number, tokenizer) for number in draw(index, args.samples, args.seed))


def _sample(index: IndexFile, bounds: np.ndarray, number: int, tokenizer: Tokenizer) -> Sample:
    begin, end = map(int, bounds[number : number + 2])
    stored = read_tokens(index, begin, min(end, begin + MAX_DECODED)).tolist()
    ids = known(np.array(stored, np.int64), tokenizer).tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if end - begin > MAX_DECODED:
        return Sample(number, end - begin, text, None)
    again = tokenizer.encode(text)
    return Sample(number, end - begin, text, stored in (again, [*again, tokenizer.eod]))


def _notes(
    index: IndexFile, problems: list[Problem], samples: tuple[Sample, ...], wanted: _Wanted, args: VerifyDataArgs
) -> Iterator[str]:
    few = min(index.num_documents, args.max_problems)
    if few <= len(problems) and all(_NO_END in problem.message for problem in problems):
        yield "no end-of-document token at all? That of data made without --append-eod is checked with --eod none"
    if wanted.eod is None or not wanted.at_ends:
        empty = int((np.diff(index.bounds()) == 0).sum())
        if empty:
            yield f"{empty} documents are empty"
    compared = [sample.same_again for sample in samples if sample.same_again is not None]
    if compared and not all(compared):
        different = len(compared) - sum(compared)
        yield (
            f"{different} of {len(compared)} documents, decoded and encoded again, have other ids: made with another "
            "tokenizer or version, cut into pieces, or the tokenizer loses part of a text"
        )
    broken = sum("\ufffd" in sample.text for sample in samples)
    if broken:
        yield f"{broken} of {len(samples)} decoded documents hold U+FFFD, which stands for broken characters"
