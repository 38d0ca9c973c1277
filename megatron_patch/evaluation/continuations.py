"""Texts as the tokens that are scored: a continuation behind its context, or a whole text, as rows for the model.

Where context and continuation meet, and what stands for an empty context, is as in EleutherAI's lm-evaluation-harness
(`TemplateLM._encode_pair`, `HFLM._loglikelihood_tokens`), so that figures compare. It knows a tokenizer; no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_patch.evaluation.documents import beginning, own_beginning
from megatron_patch.evaluation.windows import Row, rolling
from megatron_patch.tokenizer import Tokenizer

Pair = tuple[str, str]
"""A context, and what continues it."""


@dataclass(frozen=True)
class Encoding:
    """How texts become tokens."""

    tokenizer: Tokenizer
    own: tuple[int, ...]
    """What the tokenizer itself puts before every text."""
    begin: tuple[int, ...]
    """What stands for an empty context."""
    parse_special_tokens: bool
    """Whether special tokens that are spelled out in a text are control tokens, as chat templates want it."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, parse_special_tokens: bool = False) -> Encoding:
        """As the tokenizer has it."""
        return cls(tokenizer, own_beginning(tokenizer), beginning(tokenizer), parse_special_tokens)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, each behind what the tokenizer puts before it, unless the text begins so already."""
        begun = self.tokenizer.decode(self.begin[:1]) if self.parse_special_tokens else ""
        plain = self._plain(texts)
        return [
            ids if begun and text.startswith(begun) else [*self.own, *ids]
            for text, ids in zip(texts, plain, strict=True)
        ]

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "parse_special_tokens": self.parse_special_tokens}
        return self.tokenizer.encode_batch(texts, **options)

    def pairs(self, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
        """Ids of each context and of its continuation.

        The two are encoded together and then cut behind as many tokens as the context has alone. Spaces that end a
        context go to its continuation: in most vocabularies they belong to the word behind them.

        Raises:
            ValueError: the continuation has no token of its own.
        """
        found = [self._behind_nothing(pair[1]) if pair[0] == "" else None for pair in pairs]
        moved = [_move_spaces(*pair) for pair in pairs]
        contexts = self.encode([context for context, _ in moved])
        wholes = self.encode([context + continuation for context, continuation in moved])
        for number, (context, whole) in enumerate(zip(contexts, wholes, strict=True)):
            one = found[number] or (context or list(self.begin), whole[len(context) :])
            if not one[1]:
                raise ValueError(f"{pairs[number][1]!r} has no token of its own behind {pairs[number][0][-40:]!r}")
            found[number] = one
        return found

    def _behind_nothing(self, text: str) -> tuple[list[int], list[int]]:
        (ids,), begin = self._plain([text]), list(self.begin)
        if ids[: len(begin)] == begin:  # it says itself what it begins with
            return begin, ids[len(begin) :]
        return begin, ids

    def windows(self, text: str, seq_length: int) -> Iterator[Row]:
        """The rows of a whole text, whose first token is given what begins a text."""
        (ids,) = self.encode([text])
        return rolling(np.array(ids, np.int64), self.begin, seq_length, seq_length)


def row(context: Sequence[int], continuation: Sequence[int], seq_length: int) -> Row:
    """The continuation counts; of a context that does not fit, the beginning is left out.

    Raises:
        ValueError: the continuation alone does not fit.
    """
    if len(continuation) > seq_length:
        raise ValueError(
            f"what is to be scored has {len(continuation)} tokens and does not fit into --seq-length {seq_length}"
        )
    ids = np.array([*context, *continuation], np.int64)
    return Row(ids[-(seq_length + 1) :], len(continuation))


def _move_spaces(context: str, continuation: str) -> Pair:
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation
