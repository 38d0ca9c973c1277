"""The words of a text as a byte-level base cuts it, with one character in place of each of the base's tokens.

    words = Words(open_byte_level("llama3/"))
    words.add(["中国人民"])                        # words.counts: a string of two characters -> 1
    words.uses({"ä¸ŃåĽ½äººæ°ĳ": ("ä¸ŃåĽ½", "äººæ°ĳ")})       # the new token -> 1

New merges stand behind all old ones, so what they do to a text is what they do to the old tokens of each word: the
text itself is read once. Which characters stand for the tokens means nothing. It knows no corpora.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_patch.vocab.byte_level import ByteLevel, Merge

SEPARATOR = chr(0x10FFFF)
_FIRST_SURROGATE, _SURROGATES = 0xD800, 0x800
_MOST_IDS = 0x10FFFF - _SURROGATES - 1
_WORDS_A_LINE = 1000


class Words:
    """Words and how often they occur; those of one token are left out, for there is nothing to merge."""

    def __init__(self, base: ByteLevel) -> None:
        if base.size > _MOST_IDS:
            raise ValueError(f"{base.directory}: there is no character for each of more than {_MOST_IDS} ids")
        self.counts: Counter[str] = Counter()
        codes = _codes(np.arange(base.size))
        self._letters = {token: chr(codes[number]) for token, number in base.vocab.items()}
        self._backend = base.backend()

    def add(self, texts: Sequence[str]) -> None:
        """Counts the words of these texts. Tokens that were added to the model are words by themselves."""
        for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False):
            ids, places = np.array(encoding.ids, np.int64), np.array(encoding.word_ids, np.int64)
            line = _text(np.insert(_codes(ids), np.flatnonzero(np.diff(places)) + 1, ord(SEPARATOR)))
            self.counts.update(word for word in line.split(SEPARATOR) if len(word) > 1)

    def spelled(self, merges: Sequence[Merge]) -> list[Merge]:
        """Merges of such characters as merges of tokens."""
        tokens = {letter: token for token, letter in self._letters.items()}
        return [("".join(map(tokens.__getitem__, a)), "".join(map(tokens.__getitem__, b))) for a, b in merges]

    def uses(self, tokens: Mapping[str, Merge]) -> dict[str, int]:
        """How often each of these new tokens remains once they are all merged.

        Args:
            tokens: in order of rank: what each is merged from, old tokens and such as stand before it.
        """
        spelled = dict(self._letters)
        for token, (left, right) in tokens.items():
            spelled[token] = spelled[left] + spelled[right]
        vocab = {name: number for number, name in enumerate(map(spelled.__getitem__, tokens))}
        letters = sorted(set(chain.from_iterable(chain(vocab, self.counts))))
        vocab |= {letter: len(vocab) + number for number, letter in enumerate(letters)}
        merges = [(spelled[left], spelled[right]) for left, right in tokens.values()]
        tokenizer = Tokenizer(models.BPE(vocab, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(SEPARATOR)
        found = np.zeros(len(vocab), np.int64)
        for lines, times in self._lines():
            for encoding, weights in zip(tokenizer.encode_batch(lines), times, strict=True):
                np.add.at(found, encoding.ids, weights[encoding.word_ids])
        return dict(zip(tokens, found[: len(tokens)].tolist(), strict=True))

    def _lines(self, size: int = 64) -> Iterator[tuple[list[str], list[np.ndarray]]]:
        """Lines of words, some at a time, and how often each word occurs."""
        words = iter(self.counts.items())
        while block := [line for _ in range(size) if (line := list(islice(words, _WORDS_A_LINE)))]:
            lines = [SEPARATOR.join(word for word, _ in line) for line in block]
            yield lines, [np.array([times for _, times in line], np.int64) for line in block]


def _codes(ids: np.ndarray) -> np.ndarray:
    """Code points for ids, in the same order: all but the surrogates, which no text can hold."""
    return ids + 1 + _SURROGATES * (ids + 1 >= _FIRST_SURROGATE)


def _text(codes: np.ndarray) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le")
