"""The encoder that worker processes run: a picklable recipe that becomes a function from texts to token ids.

A fast tokenizer travels as its own serialised backend, taken from the tokenizer that transformers loaded. So a worker
needs only the `tokenizers` library (0.1 s to import instead of seconds for torch and transformers), and its ids are
those of transformers by construction, even where transformers rebuilds or repairs what `tokenizer.json` says.
Any other tokenizer is loaded again by transformers inside the worker.

It does not know datasets, files or special-token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class EncoderRecipe:
    """What a process needs to rebuild the encoder of a tokenizer."""

    directory: str
    """The tokenizer's directory."""
    trust_remote_code: bool = False
    """Let transformers run Python code that lies in the directory."""
    backend_json: str | None = None
    """The serialised backend of a fast tokenizer; None for the others."""

    def build(self) -> Encode:
        """Returns a function that encodes documents as `Tokenizer.encode_batch` does."""
        if self.backend_json is not None:
            return _backend_encoder(self.backend_json)
        from megatron_patch.tokenizer.hf import load_tokenizer

        return load_tokenizer(self.directory, self.trust_remote_code).encode_batch


def _backend_encoder(backend_json: str) -> Encode:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(backend_json)
    backend.no_truncation()
    backend.no_padding()
    # Not part of the JSON. A special token spelled out in a document is text: it must not become a control token.
    backend.encode_special_tokens = True

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts))]

    return encode
