"""Rendered conversations to samples: token ids as transformers gives them, and a mask of those to be learned.

The text is cut at the control tokens that the template wrote (templates.py); whatever is between them is text, however
it is spelled, as `Tokenizer.encode` has it. For a text without such spellings the ids are those of
`apply_chat_template(tokenize=True)`. A token is learned if any character of it is: one that straddles the beginning of
an answer has to be written by the model, and the model sees nothing of it before.

It does not know templates, nor how long a sample may be.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_patch.data.sft.samples import Sample
from megatron_patch.data.sft.templates import Rendered, TemplateRecipe, Unusable

if TYPE_CHECKING:
    from megatron_patch.tokenizer import Tokenizer

_OPEN, _CLOSE = "\U000f0000", "\U000f0001"
"""Around the number of a control token, in place of its spelling: characters for private use."""


class Encode(Protocol):
    """A function from rendered conversations to samples."""

    def __call__(self, pages: Sequence[Rendered]) -> list[Sample | Unusable]: ...


@dataclass(frozen=True)
class EncodeRecipe:
    """What a process needs to encode conversations; without a backend, the tokenizer is loaded there."""

    directory: str
    trust_remote_code: bool
    backend_json: str | None
    controls: tuple[tuple[str, int], ...]
    """Spelling and id of every token that a template writes."""

    def build(self) -> Encode:
        """The function. Raises ValueError if the tokenizer cannot tell which characters a token is made of."""
        if self.backend_json is not None:
            return _BackendEncoder(self.backend_json, dict(self.controls))
        from megatron_patch.tokenizer.hf import load_tokenizer

        return _SentencePieceEncoder(load_tokenizer(self.directory, self.trust_remote_code), dict(self.controls))


def encode_recipe(tokenizer: Tokenizer, template: TemplateRecipe) -> EncodeRecipe:
    """How to encode with a tokenizer what a template writes."""
    hf, wanted = tokenizer.hf, {one.content for one in template.controls}
    added = ((token.content, number) for number, token in sorted(hf.added_tokens_decoder.items()))
    controls = tuple(one for one in added if one[0] in wanted)
    backend_json = hf.backend_tokenizer.to_str() if hf.is_fast else None
    return EncodeRecipe(tokenizer.directory, tokenizer.trust_remote_code, backend_json, controls)


def _any_in(flags: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """For each range, whether any flag in it is set; for an empty one, whether that of what follows is.

    Tokens of no character are the space that SentencePiece puts before a text, and all but the last byte of a character
    that is spelled in bytes: they lead to what follows.
    """
    before = np.zeros(len(flags) + 1, np.int64)
    np.cumsum(flags, out=before[1:])
    following = (
        np.append(flags, flags[-1:])[np.minimum(starts, len(flags))] if len(flags) else np.zeros(len(starts), bool)
    )
    return np.where(starts == ends, following, before[ends] > before[starts])


# ----------------------------------------------------------------------------------------------------------- tokenizers


class _BackendEncoder:
    """The backend of a fast tokenizer, in which control tokens are spelled as no text is.

    So the backend itself cuts, normalises and splits as it always does, and what looks like a control token is text.
    """

    def __init__(self, backend_json: str, controls: dict[str, int]) -> None:
        from tokenizers import Tokenizer

        settings = json.loads(backend_json)
        self._spelling = {content: f"{_OPEN}{number}{_CLOSE}" for content, number in controls.items()}
        for token in settings["added_tokens"]:
            token["content"] = self._spelling.get(token["content"], token["content"])
        settings["post_processor"] = settings["truncation"] = settings["padding"] = None
        self._backend = Tokenizer.from_str(json.dumps(settings, ensure_ascii=False))
        # The backend numbers tokens that it finds under no known spelling anew.
        numbers = {self._backend.token_to_id(token["content"]): token["id"] for token in settings["added_tokens"]}
        self._ids = np.arange(max(self._backend.get_vocab().values(), default=0) + 1, dtype=np.int32)
        self._ids[list(numbers)] = list(numbers.values())
        self._leaked = np.isin(np.arange(len(self._ids)), [*controls.values()])
        """By the backend's id: whether it is a control token's that nobody may have spelled."""
        self._leaked[list(numbers)] = False

    def __call__(self, pages: Sequence[Rendered]) -> list[Sample | Unusable]:
        spelled = [self._spelled(page) for page in pages]
        found = self._backend.encode_batch([text for text, _ in spelled], add_special_tokens=False)
        return [self._sample(page, flags, one) for page, (_, flags), one in zip(pages, spelled, found, strict=True)]

    def _spelled(self, page: Rendered) -> tuple[str, np.ndarray]:
        """The text with control tokens spelled anew, and its characters to be learned."""
        texts, flags, end = [], [], 0
        for start, stop in page.controls:
            control = self._spelling[page.text[start:stop]]
            texts += [page.text[end:start], control]
            flags += [page.learned[end:start], np.full(len(control), page.learned[start])]
            end = stop
        return "".join([*texts, page.text[end:]]), np.concatenate([*flags, page.learned[end:]])

    def _sample(self, page: Rendered, flags: np.ndarray, found: Any) -> Sample | Unusable:
        if _OPEN in page.text:
            return Unusable("private-use character", f"U+{ord(_OPEN):X} is in the text")
        ids = np.array(found.ids, np.int64)
        if self._leaked[ids].any():
            spelled = page.text[slice(*found.offsets[int(self._leaked[ids].argmax())])]
            return Unusable("a special token in a text", f"the tokenizer takes {spelled!r} for one wherever it stands")
        offsets = np.array(found.offsets, np.int64).reshape(-1, 2)
        return Sample(self._ids[ids], _any_in(flags, offsets[:, 0], offsets[:, 1]))


class _SentencePieceEncoder:
    """A tokenizer that leaves text to the sentencepiece library, piece by piece between control tokens."""

    def __init__(self, tokenizer: Tokenizer, controls: dict[str, int]) -> None:
        self._hf, self._controls = tokenizer.hf, controls
        if not hasattr(self._hf, "sp_model") or getattr(self._hf, "_spells_blanks", False):
            raise ValueError(
                f"the tokenizer in {tokenizer.directory} cannot tell which characters a token is made of; "
                "conversations need one with a tokenizer.json or a plain SentencePiece model"
            )

    def __call__(self, pages: Sequence[Rendered]) -> list[Sample | Unusable]:
        return [self._sample(page) for page in pages]

    def _sample(self, page: Rendered) -> Sample:
        ids: list[int] = []
        masks: list[np.ndarray] = []
        end = 0
        for start, stop in chain(page.controls, [(len(page.text),) * 2]):
            self._add(page.text[end:start], page.learned[end:start], ids, masks)
            if stop > start:
                ids.append(self._controls[page.text[start:stop]])
                masks.append(page.learned[start : start + 1])
            end = stop
        return Sample(np.array(ids, np.int32), np.concatenate([np.empty(0, bool), *masks]))

    def _add(self, text: str, flags: np.ndarray, ids: list[int], masks: list[np.ndarray]) -> None:
        from sentencepiece.sentencepiece_pb2 import SentencePieceText

        if not text:
            return
        pieces = SentencePieceText.FromString(self._hf.sp_model.encode(text, out_type="serialized_proto")).pieces
        ids += [self._hf.convert_tokens_to_ids(one.piece) for one in pieces]
        bounds = np.array([(one.begin, one.end) for one in pieces], np.int64).reshape(-1, 2)
        masks.append(_any_in(np.repeat(flags, _utf8_lengths(text)), bounds[:, 0], bounds[:, 1]))


def _utf8_lengths(text: str) -> np.ndarray:
    """Bytes of each character: sentencepiece counts in them."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
