"""Duplicates: against sets of plain Python, exact Jaccard similarity and theory; in any batches, and resumed."""

from __future__ import annotations

import pickle
import random
import unicodedata

import numpy as np
import pytest

from megatron_patch.data import dedup as module
from megatron_patch.data.arguments import DedupArgs
from megatron_patch.data.dedup import (
    EXACT,
    NEAR,
    SHINGLE,
    Deduplicator,
    bands,
    fingerprints,
    minhash,
    shingles,
    similarity,
)

EXACTLY, NEARLY = DedupArgs(dedup="exact"), DedupArgs(dedup="near")
ALPHABET = [chr(code) for code in range(0x4E00, 0x9FA5)]


def passage(draw: random.Random, chars: int) -> str:
    return "".join(draw.choices(ALPHABET, k=chars))


def edited(draw: random.Random, text: str, share: float) -> str:
    """The text with its tail replaced, so that about `share` of the pieces of both are common."""
    keep = int(len(text) * 2 * share / (1 + share))
    return text[:keep] + passage(draw, len(text) - keep)


def jaccard(a: str, b: str) -> float:
    """Of the sets of 5-character pieces, exactly."""
    first, second = ({text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} for text in (a, b))
    return len(first & second) / len(first | second)


def judge(deduplicator: Deduplicator, texts: list[str], args: DedupArgs, batch: int) -> list[str | None]:
    starts = range(0, len(texts), batch)
    return [
        reason for start in starts for reason in deduplicator.judge(fingerprints(texts[start : start + batch], args))
    ]


def mixed(count: int, seed: int = 5) -> list[str]:
    """Passages, each followed sometimes by copies of earlier ones, exact, spaced out or with a changed end."""
    draw = random.Random(seed)
    texts: list[str] = []
    for _ in range(count):
        text = passage(draw, draw.randrange(80, 300))
        if texts and draw.random() < 0.4:
            old = draw.choice(texts)
            text = draw.choice([old, " \n".join(old), edited(draw, old, 0.95)])
        texts.append(text)
    return texts


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_exact_duplicates_are_those_that_a_set_of_texts_finds(batch, monkeypatch):
    monkeypatch.setattr(module, "_RECENT", 16)  # so that keys move through all stages
    texts, seen, expected = mixed(500), set(), []
    for text in texts:
        key = "".join(unicodedata.normalize("NFKC", text).split())
        expected.append(EXACT if key in seen else None)
        seen.add(key)
    assert judge(Deduplicator(EXACTLY), texts, EXACTLY, batch) == expected
    assert 50 < expected.count(EXACT) < 450


def test_white_space_and_full_width_forms_make_no_difference_and_letters_do():
    texts = ["价格 １２ 元", "价格12元\n", "价格12\u3000元", "价格13元", "价格12圆"]
    assert judge(Deduplicator(EXACTLY), texts, EXACTLY, 5) == [None, EXACT, EXACT, None, None]


def test_keys_that_end_in_zero_bytes_stay_apart():
    keys = np.array([b"a" * 15, b"a" * 14, b"a" * 15 + b"\x00", b"a" * 15 + b"\x01"], "S16")
    runs = module._Runs()
    runs.add(keys[:1], np.array([5], np.uint32))
    assert runs.find(keys)[0].tolist() == [0, 2]  # all keys have 16 bytes: the first was one with a zero at its end


def test_runs_find_every_number_of_a_key_and_stay_few():
    draw = np.random.default_rng(0)
    keys, runs = draw.integers(0, 500, 3000).astype(np.uint64), module._Runs()
    for start in range(0, 3000, 50):
        runs.add(keys[start : start + 50], np.arange(start, start + 50, dtype=np.uint32))
    wanted = np.arange(600, dtype=np.uint64)
    positions, numbers = runs.find(wanted)
    found = set(zip(positions.tolist(), numbers.tolist(), strict=True))
    assert found == {(int(key), number) for number, key in enumerate(keys)}
    assert len(runs._runs) <= 7


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_the_estimate_of_similarity_is_unbiased_and_as_exact_as_theory_says(share):
    draw, errors = random.Random(11), []
    for _ in range(200):
        text = passage(draw, 300)
        other = edited(draw, text, share)
        first, second = (minhash(shingles(one, SHINGLE)).astype(np.uint8) for one in (text, other))
        errors.append(similarity(first[None], second)[0] - jaccard(text, other))
    sigma = (share * (1 - share) / module.PERMUTATIONS) ** 0.5
    assert abs(np.mean(errors)) < 4 * sigma / 200**0.5
    assert np.std(errors) < 1.25 * sigma


def test_near_duplicates_are_found_and_dissimilar_documents_are_not():
    draw = random.Random(2)
    base = [passage(draw, 300) for _ in range(60)]
    close, far = ([edited(draw, text, share) for text in base] for share in (0.92, 0.6))
    assert min(map(jaccard, base, close)) > 0.9 and 0.5 < min(map(jaccard, base, far)) < 0.7
    assert judge(Deduplicator(NEARLY), base + far + close, NEARLY, 50) == [None] * 120 + [NEAR] * 60
    lower = DedupArgs(dedup="near", dedup_threshold=0.4)
    assert judge(Deduplicator(lower), base + far, lower, 50) == [None] * 60 + [NEAR] * 60
    assert judge(Deduplicator(EXACTLY), base + far + close, EXACTLY, 50) == [None] * 180


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_two_documents_at_the_threshold_share_a_band_nearly_always(threshold):
    count, rows = bands(threshold)
    assert count * rows <= module.PERMUTATIONS
    assert 1 - (1 - threshold**rows) ** count >= 0.95


def test_short_documents_are_compared_whole():
    texts = ["天气", "天气好", "天气", "天", "气", "天 气"]
    assert judge(Deduplicator(NEARLY), texts, NEARLY, 2) == [None, None, EXACT, None, None, EXACT]


def test_the_first_occurrence_wins_and_a_document_left_out_hides_no_other():
    draw = random.Random(9)
    first = passage(draw, 400)
    second = edited(draw, first, 0.9)
    third = second[80:] + passage(draw, 60)
    assert jaccard(second, third) > 0.65 > jaccard(first, third)
    args = DedupArgs(dedup="near", dedup_threshold=0.65)
    assert judge(Deduplicator(args), [first, second, third], args, 3) == [None, NEAR, None]
    assert judge(Deduplicator(args), [second, third], args, 3) == [None, NEAR]


@pytest.mark.parametrize("args", [EXACTLY, NEARLY], ids=["exact", "near"])
def test_batches_and_a_resumed_state_make_no_difference(args, monkeypatch):
    texts = mixed(300)
    whole = judge(Deduplicator(args), texts, args, 300)
    monkeypatch.setattr(module, "_RECENT", 10)
    assert judge(Deduplicator(args), texts, args, 1) == whole
    deduplicator = Deduplicator(args)
    start = judge(deduplicator, texts[:130], args, 13)
    resumed = pickle.loads(pickle.dumps(deduplicator))
    assert start + judge(resumed, texts[130:], args, 17) == whole
    assert whole.count(NEAR) > 20 if args is NEARLY else NEAR not in whole


def test_fingerprints_are_the_same_in_every_release():
    prints = fingerprints(["今天天气很好，我们去公园散步。"], NEARLY)
    assert prints.keys[0].hex() == "0052c6bff2123d86e8405445782d09cf"
    assert prints.signatures[0, :6].tolist() == [195, 236, 133, 181, 164, 60]
    assert prints.bands[0, :2].tolist() == [15109039332720738579, 11203951705025605826]


@pytest.mark.parametrize(("args", "bytes_each"), [(EXACTLY, 24), (NEARLY, 450)], ids=["exact", "near"])
def test_the_state_is_small(args, bytes_each):
    draw = np.random.default_rng(1)
    documents, deduplicator = 10_000, Deduplicator(args)
    columns = (bands(0.8)[0], module.PERMUTATIONS) if args is NEARLY else (0, 0)
    for _ in range(documents // 5000):
        keys = np.frombuffer(draw.bytes(16 * 5000), "S16")
        hashes = draw.integers(0, 2**63, (5000, columns[0]), np.uint64)
        signatures = draw.integers(0, 256, (5000, columns[1]), np.uint8)
        assert not any(deduplicator.judge(module.Fingerprints(keys, signatures, hashes)))
    assert len(pickle.dumps(deduplicator)) / documents < bytes_each


def test_a_threshold_out_of_range_or_without_effect_is_refused():
    assert "above 0, at most 1" in DedupArgs(dedup="near", dedup_threshold=0.0).dedup_problems()[0]
    assert "no effect without --dedup near" in DedupArgs(dedup="exact", dedup_threshold=0.7).dedup_problems()[0]
    assert DedupArgs(dedup="near", dedup_threshold=0.7).dedup_problems() == []
