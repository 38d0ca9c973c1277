"""A Hugging Face tokenizer directory as a small frozen record.

The record gives token ids for text, text for token ids, and the few attributes that `GPTDatasetConfig` of
megatron-core reads (`eod`, `eos`, `pad`, `vocab_size`, `unique_identifiers`). Files are read locally, nothing is
downloaded, and Python code inside the directory runs only on request.

It does not know models: the padded size of an embedding is not its business.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_patch.tokenizer.conventions import CONVENTIONS, recognise, remote_classes
from megatron_patch.tokenizer.encoder import EncoderRecipe

# Every file from which transformers may build a tokenizer; together they say whether two directories tokenize alike.
_TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken.json", "*_tokens*.json",
)  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer. Strings that look like special tokens are plain text unless a caller asks otherwise."""

    hf: Any = field(repr=False, compare=False)
    """The transformers tokenizer, for what this record does not offer (chat templates, for example)."""
    directory: str
    """Where it was loaded from."""
    vocab_size: int
    """Number of ids, added tokens included: every id is below it. (transformers' own `vocab_size` leaves them out.)"""
    bos: int | None
    """Id of the beginning-of-sequence token, if there is one."""
    eos: int | None
    """Id of the end-of-sequence token, if there is one."""
    fingerprint: str
    """Digest of the tokenizer's files: equal for two directories that hold the same tokenizer."""
    trust_remote_code: bool = False
    """Whether Python code inside the directory was allowed to run."""

    @property
    def eod(self) -> int | None:
        """Id that ends a document: the end-of-sequence token."""
        return self.eos

    @property
    def pad(self) -> int:
        """The id that megatron-core's datasets pad with: -1, which no document can hold.

        Core masks the loss of every token equal to the pad id and rewrites it to 0. A real id here (Llama's <unk>,
        Qwen's <|endoftext|>) would make it do so to tokens of the corpus, and None makes it fail on a short sample.
        """
        return -1

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """What tells this tokenizer from others in the name of a dataset's cached index: content, not location."""
        return OrderedDict(class_name=type(self).__name__, fingerprint=self.fingerprint)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special_tokens: bool = False) -> list[int]:
        """Token ids of one text; see `encode_batch`."""
        options = {"add_special_tokens": add_special_tokens, "parse_special_tokens": parse_special_tokens}
        return self.encode_batch([text], **options)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, parse_special_tokens: bool = False
    ) -> list[list[int]]:
        """Token ids of every text, as long as they come: neither cut nor padded.

        add_special_tokens: let the tokenizer put in what it puts in by its own configuration (Llama's BOS).
        parse_special_tokens: read special tokens that are spelled out in a text ("</s>") as control tokens. For
            prompts only: in a document they would be control tokens that nobody put there.
        """
        if not texts:
            return []
        return self.hf(
            list(texts),
            add_special_tokens=add_special_tokens,
            split_special_tokens=not parse_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids, with no tidying of spaces."""
        return self.hf.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def encoder_recipe(self) -> EncoderRecipe:
        """What a worker process needs to encode documents exactly as `encode_batch` does."""
        if not self.hf.is_fast:
            return EncoderRecipe(self.directory, self.trust_remote_code)
        from megatron_patch.tokenizer.sentencepiece_fast import for_documents

        backend_json = for_documents(self.hf.backend_tokenizer)
        return EncoderRecipe(self.directory, self.trust_remote_code, backend_json)


def load_tokenizer(directory: str | Path, trust_remote_code: bool = False) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face directory.

    Raises ValueError if the directory or the tokenizer in it cannot be read, or if it needs Python code of its own
    and trust_remote_code is not given.
    """
    path = Path(directory)
    files = tokenizer_files(path)
    hf = _load_hf(path, trust_remote_code)
    return Tokenizer(
        hf=hf,
        directory=str(path),
        vocab_size=max(hf.get_vocab().values()) + 1,
        bos=hf.bos_token_id,
        eos=hf.eos_token_id,
        fingerprint=_digest(files),
        trust_remote_code=trust_remote_code,
    )


def tokenizer_files(directory: Path) -> tuple[Path, ...]:
    """The files that make up the tokenizer of a directory, sorted by name; ValueError if there is none."""
    if not directory.is_dir():
        raise ValueError(f"tokenizer directory {str(directory)!r} does not exist; give a local Hugging Face directory")
    found = {file for pattern in _TOKENIZER_FILES for file in directory.glob(pattern) if file.is_file()}
    if not found:
        raise ValueError(
            f"{str(directory)!r} holds no tokenizer: expected tokenizer.json, tokenizer.model, vocab.json + merges.txt "
            "or the like"
        )
    return tuple(sorted(found))


def _load_hf(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        # Published code goes first where the user wants it to run; otherwise its vocabulary files are read without it.
        recognised = None if trust_remote_code else recognise(path)
        if recognised is not None:
            from megatron_patch.tokenizer.published import build

            return build(recognised)
        hf = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=trust_remote_code)
        from megatron_patch.tokenizer.sentencepiece_fast import exact

        return exact(hf, path)
    except Exception as error:  # transformers raises whatever its parsers raise
        advice = "" if trust_remote_code else _advice(path)
        raise ValueError(f"cannot load the tokenizer in {str(path)!r}: {error}{advice}") from error


def _advice(path: Path) -> str:
    """What to do about a tokenizer that is Python code of the directory."""
    classes = ", ".join(f"{name} ({module}.py)" for module, name in remote_classes(path))
    known = ", ".join(sorted({f"{row.names[0]}: {row.file}" for row in CONVENTIONS}))
    return (
        f"\n{classes} is Python code of the directory. Read without its code are {known}; "
        "for the others give --trust-remote-code, which runs that code"
        if classes
        else ""
    )


def _digest(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
