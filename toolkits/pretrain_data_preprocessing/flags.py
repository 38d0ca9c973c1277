"""The flags of Megatron-LM's and the predecessor's preprocess_data.py, as data, and what each becomes here.

A flag is passed on under our name, is not needed, or is refused with the reason. It does not run anything, and does
not know which tokenizer a directory holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NoReturn

_MODEL = "not needed: it is about the model; a data set knows the tokenizer's vocabulary alone"
_SENTENCES = "not needed: only cutting documents into sentences asks for it, and newlines are kept"
_TIKTOKEN = "a tokenizer is read from a Hugging Face directory, which says it itself"


@dataclass(frozen=True)
class Flag:
    """One flag of the script that users know."""

    names: str
    """Its spellings."""
    values: Literal["0", "1", "+"]
    """How many values follow it."""
    becomes: str = ""
    """Our flag."""
    unused: str = ""
    """Why it has no effect here; shown."""
    refused: str = ""
    """Why it is refused."""

    @property
    def name(self) -> str:
        """Its first spelling."""
        return self.names.split()[0]


FLAGS = (
    Flag("--input", "+", becomes="--input"),
    Flag("--json-keys --jsonl-keys", "+", becomes="--json-keys"),
    Flag("--output-prefix", "1", becomes="--output-prefix"),
    Flag("--tokenizer-model", "1", becomes="--tokenizer-model"),
    Flag("--load", "1", becomes="--tokenizer-model"),
    Flag("--vocab-file --vocab", "1", becomes="--tokenizer-model"),
    Flag("--merge-file", "1", becomes="--tokenizer-model"),
    Flag("--tokenizer-type --patch-tokenizer-type", "1", unused="compared; the directory decides"),
    Flag("--append-eod", "0", becomes="--append-eod"),
    Flag("--workers", "1", becomes="--workers"),
    Flag("--log-interval", "1", becomes="--log-interval"),
    Flag("--dataset-impl", "1", unused="not needed: mmap is what megatron-core reads"),
    Flag("--partitions", "1", unused="not needed: workers share the work without copies of the input"),
    Flag("--keep-sequential-samples", "0", unused="not needed: documents are written in the order of the input"),
    Flag("--num-docs", "1", unused="not needed: progress goes by bytes"),
    Flag("--seq-length", "1", unused="not needed: documents are cut into samples when a model is trained"),
    Flag("--keep-newlines", "0", unused=_SENTENCES),
    Flag("--lang", "1", unused=_SENTENCES),
    *(Flag(name, "1", unused=_MODEL) for name in (
        "--extra-vocab-size", "--vocab-size", "--vocab-extra-ids", "--make-vocab-size-divisible-by",
        "--padded-vocab-size", "--tensor-model-parallel-size", "--rank",
    )),
    Flag("--split-sentences", "0", refused="a document stays one sequence; sentences are for BERT and T5"),
    Flag("--ftfy", "0", refused="text is not guessed at; for what is certain there is --clean nfc control zero-width"),
    Flag("--tiktoken-pattern", "1", refused=_TIKTOKEN),
    Flag("--tiktoken-num-special-tokens", "1", refused=_TIKTOKEN),
    Flag("--tiktoken-special-tokens", "+", refused=_TIKTOKEN),
    Flag("--tokenizer-hf-include-special-tokens", "0", refused="the tokenizer's own configuration says it"),
    Flag("--find-optimal-num-workers", "0", refused="give --workers the number of cores"),
    Flag("--workers-to-check", "+", refused="give --workers the number of cores"),
    Flag("--max-documents", "1", refused="give a smaller file; all documents of the input are written"),
)  # fmt: skip
"""Every flag of theirs."""

REFUSED_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "BertWordPieceLowerCase": "a vocabulary of BERT has no end of document and cannot continue text",
        "BertWordPieceCase": "a vocabulary of BERT has no end of document and cannot continue text",
        "NullTokenizer": "numbers are not tokenized here",
        "NullMultimodalTokenizer": "numbers are not tokenized here",
        "MultimodalTokenizer": "only text is tokenized here",
        "TikTokenizer": _TIKTOKEN + "; its type is HuggingFaceTokenizer",
    }
)
"""Tokenizer types that nothing here stands for."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def read(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The flags of a call that are theirs, by first spelling and with their values, and all other words in order.

    Raises:
        ValueError: a flag of theirs lacks its value.
    """
    parser = _Parser(prog="preprocess_data.py", allow_abbrev=False, add_help=False)
    for flag in FLAGS:
        kind = {"0": {"action": "store_true", "default": None}, "1": {}, "+": {"nargs": "+"}}[flag.values]
        parser.add_argument(*flag.names.split(), dest=flag.name, **kind)
    known, rest = parser.parse_known_args(list(argv))
    given = {name: value for name, value in vars(known).items() if value is not None}
    return {
        name: [] if value is True else [value] if isinstance(value, str) else value for name, value in given.items()
    }, rest


def usage() -> str:
    """Every flag of theirs and what becomes of it, a line each."""
    lines = []
    for flag in FLAGS:
        what = flag.becomes and f"-> {flag.becomes}" or flag.unused or f"refused: {flag.refused}"
        lines.append(f"  {', '.join(flag.names.split()):44}{what}")
    return "\n".join(lines)
