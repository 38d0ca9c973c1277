"""Which learned merges a byte-level base gets: those of wanted tokens that can be reached and that a corpus uses.

    choice = Choice(base, script="cjk")
    choice.choose(learned, max_new=0)
    choice.drop_unused(words_of(base, corpus, cjk=True), min_count=1)
    choice.merges

It knows neither files nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from megatron_patch.vocab.byte_level import ByteLevel, Merge, bytes_of, is_cjk_token
from megatron_patch.vocab.byte_level_words import Words
from megatron_patch.vocab.corpus import Corpus, batches
from megatron_patch.vocab.scripts import has_cjk

_ROUNDS = 16
_IDLE_SHARE = 0.005
"""Of the new tokens, so many may be there only for others to be merged from."""


@dataclass
class Choice:
    """The new tokens in order of rank, each with the two that it is merged from, as they get fewer."""

    base: ByteLevel
    script: str
    tokens: dict[str, Merge] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def merges(self) -> list[Merge]:
        return list(self.tokens.values())

    def choose(self, learned: Sequence[Merge], max_new: int = 0) -> None:
        """Takes what passes the script filter and can be reached; ValueError if that is nothing."""
        self.tokens = {left + right: (left, right) for left, right in learned}
        self._keep(lambda token: token not in self.base.vocab, "the base has them")
        self._keep(self._wanted, "other scripts")
        self._drop_unreachable()
        if max_new:
            best = set(islice(self.tokens, max_new))
            self._keep(best.__contains__, "beyond --max-new")
        if not self.tokens:
            dropped = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items())
            raise ValueError(f"there is no token to add to {self.base.directory} ({dropped})")

    def drop_unused(self, words: Words, min_count: int) -> None:
        """Drops tokens that the words have too rarely, unless others are merged from them, until none is left.

        Few may be there for others' sake alone: where there are more, what the least useful of them are parts of goes,
        but for characters, whole or cut: no word of theirs goes.
        """
        for _ in range(_ROUNDS if min_count else 0):
            counts, before = words.uses(self.tokens), len(self.tokens)
            useful = supported(self.tokens, (token for token in self.tokens if counts[token] >= min_count))
            self._keep(useful.__contains__, f"used less than {min_count} times")
            idle = {one for one in idlers(self.tokens, counts)[int(_IDLE_SHARE * before) :] if _is_word(one)}
            rest = {token: pair for token, pair in self.tokens.items() if not idle.intersection(pair)}
            self._keep(complete(self.base, rest).__contains__, "of parts that are never used alone")
            if len(self.tokens) == before:
                break
        if not self.tokens:
            raise ValueError(f"no new token occurs {min_count} times in --corpus: is it text of the wanted language?")

    def _wanted(self, token: str) -> bool:
        return self.script == "any" or is_cjk_token(token)

    def _drop_unreachable(self) -> None:
        """Drops tokens that are not merged to themselves, until none is left."""
        before = set(self.tokens)
        self.tokens = mended(self.base, self.tokens, self._wanted)
        while True:
            self.tokens = complete(self.base, self.tokens)
            alone = self.base.bare(self.merges).model
            reached = {one: pair for one, pair in self.tokens.items() if len(alone.tokenize(one)) == 1}
            if len(reached) == len(self.tokens):
                break
            self.tokens = reached
        self.dropped["no text reaches them"] = len(before - self.tokens.keys())

    def _keep(self, wanted: Callable[[str], bool], reason: str) -> None:
        kept = {token: pair for token, pair in self.tokens.items() if wanted(token)}
        self.dropped[reason] = self.dropped.get(reason, 0) + len(self.tokens) - len(kept)
        self.tokens = kept


def mended(base: ByteLevel, tokens: Mapping[str, Merge], wanted: Callable[[str], bool]) -> dict[str, Merge]:
    """The tokens with characters whose parts are gone put together from their first byte on, of wanted tokens alone.

    The filter takes no tokens that are but the ends of characters, and many a character is merged from one.
    """
    known, kept, alone = set(base.model), dict[str, Merge](), None
    for token, pair in tokens.items():
        pairs = [pair]
        if not known.issuperset(pair) and _is_character(token):
            alone = alone or base.bare().model
            values = [one.value for one in alone.tokenize(token)]
            pairs = [("".join(values[:end]), values[end]) for end in range(1, len(values))]
        if len(pairs) == 1 or all(wanted(left + right) for left, right in pairs):
            kept |= {left + right: (left, right) for left, right in pairs if left + right not in kept}
            known.update(left + right for left, right in pairs)
    return kept


def _is_character(token: str) -> bool:
    try:
        return len((bytes_of(token) or b"").decode()) == 1
    except UnicodeDecodeError:
        return False


def complete(base: ByteLevel, tokens: Mapping[str, Merge]) -> dict[str, Merge]:
    """Those tokens whose parts are there before them."""
    known, kept = set(base.model), dict[str, Merge]()
    for token, pair in tokens.items():
        if known.issuperset(pair):
            kept[token] = pair
            known.add(token)
    return kept


def supported(tokens: Mapping[str, Merge], wanted: Iterable[str]) -> set[str]:
    """The wanted tokens and the new ones that they are merged from."""
    kept, waiting = set(), list(wanted)
    while waiting:
        token = waiting.pop()
        if token in tokens and token not in kept:
            kept.add(token)
            waiting += tokens[token]
    return kept


def idlers(tokens: Mapping[str, Merge], counts: Mapping[str, int]) -> list[str]:
    """The tokens of which only others are made: characters, whole or cut, and then those of the most used ones."""
    total = dict(counts)
    for token, pair in reversed(tokens.items()):
        for part in {*pair} & tokens.keys():
            total[part] += total[token]
    idle = [token for token in tokens if not counts[token]]
    return sorted(idle, key=lambda token: (_is_word(token), -total[token]))


def _is_word(token: str) -> bool:
    """Whether a token is several characters, all of them whole."""
    text = (bytes_of(token) or b"").decode(errors="replace")
    return len(text) > 1 and "\ufffd" not in text


def words_of(base: ByteLevel, corpus: Corpus, cjk: bool) -> Words:
    """The words of a corpus; texts without CJK are passed over where no other matters."""
    words = Words(base)
    for texts in batches(text for text in corpus if not cjk or has_cjk(text)):
        words.add(texts)
    return words
