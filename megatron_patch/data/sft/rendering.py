"""Conversations to samples of a length that a model takes: the template, the tokenizer and the cut in one.

    renderer = RendererRecipe.of(tokenizer, "tokenizer", seq_length=4096, truncation="right").build()
    for outcome in renderer.samples(conversations):      # a Sample, or an Unusable that says why there is none

A sample that is too long loses its end ("right") or its beginning ("left"), or is dropped ("drop"); each is counted. A
sample with nothing left to learn is an Unusable. It does not know files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatron_patch.data.sft.conversations import Conversation
from megatron_patch.data.sft.encoding import EncodeRecipe, encode_recipe
from megatron_patch.data.sft.samples import Sample
from megatron_patch.data.sft.templates import ChatTemplate, Rendered, TemplateRecipe, Unusable, find_template

if TYPE_CHECKING:
    from megatron_patch.tokenizer import Tokenizer

Truncation = Literal["right", "left", "drop"]
TRUNCATED, OPEN = "truncated", "answers without an end token"
"""What `Renderer.counts` counts."""


@dataclass(frozen=True)
class RendererRecipe:
    """Plain data that a process can be sent."""

    template: TemplateRecipe
    encode: EncodeRecipe
    seq_length: int
    """Most tokens of a sample."""
    truncation: Truncation

    @staticmethod
    def of(tokenizer: Tokenizer, template: str, seq_length: int, truncation: Truncation) -> RendererRecipe:
        """The recipe for a tokenizer and a template's name; ValueError if there is no such template."""
        found = find_template(tokenizer, template)
        return RendererRecipe(found, encode_recipe(tokenizer, found), seq_length, truncation)

    def build(self) -> Renderer:
        """The renderer. Raises ValueError if the template is none, or cannot be followed."""
        return Renderer(self)


class Renderer:
    """Makes samples, and counts."""

    def __init__(self, recipe: RendererRecipe) -> None:
        self.template = ChatTemplate(recipe.template)
        self.counts: Counter[str] = Counter()
        self._encode = recipe.encode.build()
        self._most, self._truncation = recipe.seq_length, recipe.truncation

    def sample(self, conversation: Conversation) -> Sample | Unusable:
        """The sample of one conversation."""
        return self.samples([conversation])[0]

    def samples(self, conversations: Iterable[Conversation]) -> list[Sample | Unusable]:
        """For each conversation, its sample, or why it makes none."""
        pages = [self._page(conversation) for conversation in conversations]
        made = iter(self._encode([page for page in pages if isinstance(page, Rendered)]))
        found = [page if isinstance(page, Unusable) else next(made) for page in pages]
        return [one if isinstance(one, Unusable) else self._fitted(one) for one in found]

    def _page(self, conversation: Conversation) -> Rendered | Unusable:
        try:
            page = self.template.render(conversation)
        except Unusable as error:
            return error
        self.counts[OPEN] += page.open_turns
        return page

    def _fitted(self, sample: Sample) -> Sample | Unusable:
        """The sample within its length, with something to learn."""
        length = len(sample.ids)
        if length > self._most:
            if self._truncation == "drop":
                return Unusable("longer than --seq-length", f"{length} tokens, {self._most} are the most")
            kept = slice(self._most) if self._truncation == "right" else slice(length - self._most, None)
            sample = Sample(sample.ids[kept], sample.mask[kept])
        sample.mask[:1] = False  # nothing comes before it from which it could be foretold
        if not sample.supervised:
            lost = "nothing to learn within --seq-length" if length > self._most else "nothing to learn"
            return Unusable(lost, f"{length} tokens, {self._most} are the most")
        self.counts[TRUNCATED] += length > self._most
        return sample


def marked(sample: Sample, decode: Callable[[Sequence[int]], str], begin: str = "[[", end: str = "]]") -> str:
    """The text of a sample, what is to be learned between marks."""
    cuts = [0, *(np.flatnonzero(np.diff(sample.mask)) + 1).tolist(), len(sample.ids)]
    runs = ((start, decode(sample.ids[start:stop].tolist())) for start, stop in zip(cuts, cuts[1:], strict=False))
    return "".join(f"{begin}{text}{end}" if sample.mask[start] else text for start, text in runs)
