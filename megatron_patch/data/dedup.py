"""Documents that came before: exact copies by their hash, near ones by MinHash and locality-sensitive hashing.

    prints = fingerprints(texts, DedupArgs(dedup="near"))    # in any process, any number of texts
    reasons = deduplicator.judge(prints)                     # in one, in order: None, EXACT or NEAR for each

White space and Unicode compatibility forms (full-width digits, ligatures) make no difference to either. Pieces are
5 characters long, not words: words would make a Chinese paragraph a single piece. A document is a near duplicate if an
earlier one *that was kept* shares `dedup_threshold` of their pieces (Jaccard), as estimated from 128 permutations: give
or take 0.035 at 0.8. The first occurrence wins and nothing is random, so that the outcome depends on the order of
documents alone, not on batches or on what is installed.

A `Deduplicator` is its state: numpy arrays that pickle as they are, about 20 bytes per document kept for exact
duplicates and 0.4 KB for near ones. It does not know files, tokenizers or processes.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from megatron_patch.data.arguments import DedupArgs

EXACT = "duplicate"
NEAR = "near duplicate"
PERMUTATIONS = 128
SHINGLE = 5

_FOUND = 0.95
"""Least probability that two documents just at the threshold meet in a band."""
_RECENT = 4096
"""Documents kept in dictionaries before they move into sorted arrays, a twentieth of the size."""
_BLOCK = 2048
"""Pieces permuted at a time: 128 x 2048 x 4 bytes stay in a core's cache."""
_KEY = np.dtype("S16")
"""numpy compares these as if zeros at the end were missing, which on keys of one length changes nothing."""


# -------------------------------------------------------------------------------------------------------- fingerprints


def normalized(text: str) -> str:
    """The text without white space, in Unicode's compatibility form: what is compared."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def code_points(text: str) -> np.ndarray:
    """uint32[len(text)]: the characters' numbers."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def shingles(text: str, size: int) -> np.ndarray:
    """uint64[max(1, len(text) - size + 1)]: a hash of every `size` characters in a row; a shorter text is one piece."""
    codes = code_points(text).astype(np.uint64)
    codes = np.pad(codes, (0, max(0, size - len(codes))))
    count = len(codes) - size + 1
    hashes = np.zeros(count, np.uint64)
    for offset in range(size):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes ^= codes[offset : offset + count]
        hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(32))


@cache
def _permutations() -> tuple[np.ndarray, np.ndarray]:
    """uint32[128, 1] each: x -> a x + b modulo 2^32, a permutation because a is odd."""
    draws = (xxh3_64_intdigest(b"minhash", seed) for seed in range(PERMUTATIONS))
    a, b = zip(*((draw >> 32 | 1, draw & 0xFFFFFFFF) for draw in draws), strict=True)
    return np.array(a, np.uint32)[:, None], np.array(b, np.uint32)[:, None]


def minhash(pieces: np.ndarray) -> np.ndarray:
    """uint32[128]: the least value of a document's pieces under each permutation."""
    a, b = _permutations()
    pieces = pieces.astype(np.uint32)
    least = np.full(PERMUTATIONS, 0xFFFFFFFF, np.uint32)
    for start in range(0, len(pieces), _BLOCK):
        values = a * pieces[start : start + _BLOCK]
        values += b
        np.minimum(least, values.min(axis=1), out=least)
    return least


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows in each): the longest bands of which two documents at the threshold share one nearly always."""
    rows = PERMUTATIONS
    while rows > 1 and 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) < _FOUND:
        rows -= 1
    return PERMUTATIONS // rows, rows


class Fingerprints(NamedTuple):
    """What must be known of N documents to find their duplicates."""

    keys: np.ndarray
    """S16[N]: xxh3-128 of the normalized text."""
    signatures: np.ndarray
    """uint8[N, 128]: the low bytes of the MinHash; [N, 0] where only exact duplicates are looked for."""
    bands: np.ndarray
    """uint64[N, bands]: a hash of each band of the MinHash."""


def fingerprints(texts: Sequence[str], args: DedupArgs) -> Fingerprints:
    """Fingerprints of texts: the expensive part, which needs no knowledge of other documents."""
    plain = [normalized(text) for text in texts]
    keys = np.array([xxh3_128_digest(text.encode("utf-8", "surrogatepass")) for text in plain], _KEY)
    if args.dedup != "near":
        return Fingerprints(keys, np.empty((len(texts), 0), np.uint8), np.empty((len(texts), 0), np.uint64))
    hashes = np.array([minhash(shingles(text, SHINGLE)) for text in plain], np.uint32).reshape(-1, PERMUTATIONS)
    return Fingerprints(keys, hashes.astype(np.uint8), _band_hashes(hashes, *bands(args.dedup_threshold)))


def _band_hashes(hashes: np.ndarray, count: int, rows: int) -> np.ndarray:
    rows_of = [[row[band * rows :][:rows].tobytes() for band in range(count)] for row in hashes]
    digests = [[xxh3_64_intdigest(part, band) for band, part in enumerate(parts)] for parts in rows_of]
    return np.array(digests, np.uint64).reshape(len(hashes), count)


def similarity(signatures: np.ndarray, signature: np.ndarray) -> np.ndarray:
    """float[N]: Jaccard similarity of N documents to one, estimated; low bytes are equal by chance once in 256."""
    equal = (signatures == signature).mean(axis=1)
    return (equal - 1 / 256) / (1 - 1 / 256)


# --------------------------------------------------------------------------------------------------------------- state


class _Runs:
    """Keys with a number each, in sorted arrays of which each is more than twice as long as the next."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Takes in more keys; one may be there already."""
        self._runs.append(_sorted(keys, numbers))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            newer, older = self._runs.pop(), self._runs.pop()
            self._runs.append(_sorted(*(np.concatenate(pair) for pair in zip(older, newer, strict=True))))

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions in `keys`, numbers): one pair for each number that a key stands for."""
        positions, numbers = [np.empty(0, np.int64)], [np.empty(0, np.uint32)]
        for run, values in self._runs:
            first = np.searchsorted(run, keys, "left")
            counts = np.searchsorted(run, keys, "right") - first
            positions.append(np.repeat(np.arange(len(keys)), counts))
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            numbers.append(values[np.repeat(first, counts) + within])
        return np.concatenate(positions), np.concatenate(numbers)


def _sorted(keys: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys, kind="stable")
    return keys[order], numbers[order]


class _Exact:
    """The keys of documents kept."""

    def __init__(self) -> None:
        self._stored = _Runs()
        self._recent: dict[bytes, int] = {}

    def stored(self, keys: np.ndarray) -> set[int]:
        """Positions of the keys that are among the stored ones."""
        return set(self._stored.find(keys)[0].tolist())

    def is_recent(self, key: bytes) -> bool:
        return key in self._recent

    def add(self, key: bytes, number: int) -> None:
        self._recent[key] = number

    def settle(self) -> None:
        """Moves what is recent into the arrays."""
        self._stored.add(np.array(list(self._recent), _KEY), np.array(list(self._recent.values()), np.uint32))
        self._recent = {}


class _Near:
    """The bands and signatures of documents kept."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._stored = _Runs()
        self._recent: dict[int, list[int]] = defaultdict(list)
        self._signatures = np.empty((_RECENT, PERMUTATIONS), np.uint8)

    def stored(self, bands: np.ndarray) -> dict[int, set[int]]:
        """Row of `bands` -> stored documents that share a band with it."""
        found: dict[int, set[int]] = defaultdict(set)
        positions, numbers = self._stored.find(bands.ravel())
        for row, number in zip((positions // max(1, bands.shape[1])).tolist(), numbers.tolist(), strict=True):
            found[row].add(number)
        return found

    def is_known(self, bands: list[int], signature: np.ndarray, stored: set[int]) -> bool:
        """Whether a document resembles one of those stored, or a recent one."""
        candidates = stored.union(*(self._recent.get(band, ()) for band in bands))
        if not candidates:
            return False
        return bool((similarity(self._signatures[list(candidates)], signature) >= self._threshold).any())

    def add(self, bands: list[int], signature: np.ndarray, number: int) -> None:
        if number == len(self._signatures):
            more = np.empty((number // 2, PERMUTATIONS), np.uint8)
            self._signatures = np.concatenate([self._signatures, more])
        self._signatures[number] = signature
        for band in bands:
            self._recent[band].append(number)

    def settle(self) -> None:
        """Moves what is recent into the arrays."""
        pairs = [(band, number) for band, numbers in self._recent.items() for number in numbers]
        keys, numbers = zip(*pairs, strict=True)
        self._stored.add(np.array(keys, np.uint64), np.array(numbers, np.uint32))
        self._recent.clear()


class Deduplicator:
    """Remembers the documents kept, and says of each further one whether it is new."""

    def __init__(self, args: DedupArgs) -> None:
        self._exact = _Exact()
        self._near = _Near(args.dedup_threshold) if args.dedup == "near" else None
        self._kept = self._settled = 0

    def judge(self, prints: Fingerprints) -> list[str | None]:
        """For each document, in order: None if it is new (it is then remembered), else EXACT or NEAR."""
        exact = self._exact.stored(prints.keys)
        near = self._near.stored(prints.bands) if self._near else {}
        bands = prints.bands.tolist()
        reasons: list[str | None] = []
        for row, key in enumerate(prints.keys.tolist()):
            if row in exact or self._exact.is_recent(key):
                reasons.append(EXACT)
            elif self._near and self._near.is_known(bands[row], prints.signatures[row], near.get(row, set())):
                reasons.append(NEAR)
            else:
                reasons.append(None)
                self._remember(key, bands[row], prints.signatures[row])
        if self._kept - self._settled >= _RECENT:
            self._settle()
        return reasons

    def _remember(self, key: bytes, bands: list[int], signature: np.ndarray) -> None:
        self._exact.add(key, self._kept)
        if self._near:
            self._near.add(bands, signature, self._kept)
        self._kept += 1

    def _settle(self) -> None:
        self._exact.settle()
        if self._near:
            self._near.settle()
        self._settled = self._kept
