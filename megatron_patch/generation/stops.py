"""Stop strings: whether an answer has come to one, and its text up to there.

    stops = Stops(tokenizer, ["\\n\\n", "Question:"])
    generate(..., is_finished=lambda row, new_ids: stops.is_finished(prompts[row], new_ids))
    text, stopped_by = stops.cut(text)

A string counts wherever it appears in what follows the prompt, be it in the middle of a token; one that spells a
special token counts where that token is. It knows a tokenizer's ids and texts, and nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_patch.tokenizer import Tokenizer

_CONTEXT = 8
"""Tokens that are decoded before those of interest: some tokenizers drop the space that a text begins with."""


class Stops:
    """Strings that end an answer; none is fine. Raises ValueError for an empty one."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        if "" in strings:
            raise ValueError("a stop string is empty; give at least one character")
        special = {text: number for number, text in _special_tokens(tokenizer)}
        self._tokenizer = tokenizer
        self._ids = frozenset(special[text] for text in strings if text in special)
        self._strings = tuple(text for text in strings if text not in special)
        # A token has at least a byte, so this many hold any of the strings.
        self._window = _CONTEXT + max((len(text.encode()) for text in self._strings), default=0)

    def is_finished(self, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> bool:
        """Whether an answer's last token has completed a stop string; to be asked after each."""
        if new_ids and new_ids[-1] in self._ids:
            return True
        if not self._strings:
            return False
        text = continuation(self._tokenizer, prompt_ids[-_CONTEXT:], new_ids[-self._window :])
        return any(string in text for string in self._strings)

    def cut(self, text: str) -> tuple[str, str | None]:
        """An answer's text before the first stop string in it, and that string; all of it and None without one."""
        found = [(text.find(string), -len(string), string) for string in self._strings if string in text]
        if not found:
            return text, None
        place, _, string = min(found)
        return text[:place], string


def continuation(tokenizer: Tokenizer, before: Sequence[int], after: Sequence[int]) -> str:
    """What `after` adds to the text of `before`, special tokens left out."""
    # Decoded together: some tokenizers drop the space that the first word of a text begins with.
    known, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (before, [*before, *after]))
    return whole[len(known) :] if whole.startswith(known) else tokenizer.decode(after, skip_special_tokens=True)


def _special_tokens(tokenizer: Tokenizer) -> list[tuple[int, str]]:
    return [(number, token.content) for number, token in tokenizer.hf.added_tokens_decoder.items() if token.special]
