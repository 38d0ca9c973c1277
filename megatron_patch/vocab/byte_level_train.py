"""The merges that continue a byte-level BPE on one's own text: what `megatron-patch vocab train --base` learns.

    base, texts = open_byte_level("llama3/"), Corpus(("corpus.jsonl",), "text")
    merges = learn(base, texts, count=8000)             # [("ä¸Ń", "åĽ½"), ...], the first ones first

The base cuts the text into words and these into its tokens, each of which gets one character of its own. Over words of
such characters the trainer of `tokenizers` learns an ordinary BPE. It does not know which of the merges are wanted.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_patch.vocab.byte_level import ByteLevel, Merge
from megatron_patch.vocab.byte_level_words import SEPARATOR, Words
from megatron_patch.vocab.corpus import batches

_LONGEST_WORD = 1000
"""Tokens. Longer words (some texts have no space at all) are cut: the trainer goes through them at every merge."""
_LONGEST_TOKEN = 48
"""Bytes: sixteen Chinese characters, as many as sentencepiece allows."""
_SEED = 1234
_CHUNK = 1 << 18


def learn(base: ByteLevel, texts: Iterable[str], count: int, threads: int = 1) -> list[Merge]:
    """Up to `count` merges that follow the base's own, the most frequent pair first, of those that occur twice.

    Among pairs that are equally frequent the one of the lower ids comes first; a new token counts as higher than an
    older one. ValueError if no pair of tokens occurs twice.
    """
    with _parallel(threads):
        words = Words(base)
        for batch in batches(texts):
            words.add(batch)
        merges = _train(words.counts, count)
    if not merges:
        raise ValueError("no two tokens of the base stand side by side twice; the corpus is too small to learn from")
    return [pair for pair in words.spelled(merges) if sum(map(len, pair)) <= _LONGEST_TOKEN]


def sample_lines(texts: Iterable[str], limit: int) -> list[str]:
    """A random choice of so many lines, the same each time."""
    pick, kept = random.Random(_SEED), []
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    for number, line in enumerate(lines):
        place = number if number < limit else pick.randint(0, number)
        if number < limit:
            kept.append(line)
        elif place < limit:
            kept[place] = line
    return kept


@contextmanager
def _parallel(threads: int) -> Iterator[None]:
    """Tells `tokenizers` how many threads to take; the number counts for its first work in a process."""
    wanted = {"TOKENIZERS_PARALLELISM": str(threads > 1).lower(), "RAYON_NUM_THREADS": str(threads)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _train(words: Mapping[str, int], count: int) -> list[Merge]:
    letters = set(chain.from_iterable(words))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(SEPARATOR)
    trainer = trainers.BpeTrainer(
        vocab_size=len(letters) + count,
        min_frequency=2,
        max_token_length=_LONGEST_TOKEN,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_repeated(words), trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def _repeated(words: Mapping[str, int]) -> Iterator[str]:
    """Lines that hold each word as often as the text does."""
    for word, times in words.items():
        cut = [word[start : start + _LONGEST_WORD] for start in range(0, len(word), _LONGEST_WORD)]
        line = SEPARATOR.join(cut) + SEPARATOR
        most = max(1, _CHUNK // len(line))
        for start in range(0, times, most):
            yield line * min(most, times - start)
